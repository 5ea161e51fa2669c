//! Room 1: puts the kernel programs in place and keeps their maps true.
//!
//! Door out: a [`LocalPod`] with its [`Listeners`]; what they accept has the original destination
//! as its local address.

pub mod pods;

pub use pods::{Listeners, LocalPod, PodEvent};
