//! Room 4: may it.

pub mod policy;
