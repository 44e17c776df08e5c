//! Assembly and life cycle.
