//! The node half: which pods are here, and what captures them. It has no key and asks no policy; to the proxy
//! half it speaks through [`crate::seam`] alone.

pub mod capture;
pub mod machine;
pub mod pods;
pub mod recording;
