//! Watches the corridor.
