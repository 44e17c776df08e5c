//! The seam below which hypervisors differ.
