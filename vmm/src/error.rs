//! Why a VM did not start.
