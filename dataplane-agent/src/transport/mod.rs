//! Room 5: moves bytes.
