//! The key cabinet: certificates of the identities that the pods of this node have.

pub mod certs;
pub mod tls;

#[cfg(test)]
pub(crate) mod test_ca;

use std::sync::Arc;

pub use certs::{Certs, Issued, Issuer, WorkloadCertificate};

use crate::mesh::Identity;

/// Why there is no certificate, or a peer's does not count.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IdentityError {
    /// It is not held by a pod of this node.
    #[error("workload is unknown: {0}")]
    Unknown(Identity),
    /// It could not be had.
    #[error("signing error: {0}")]
    Signing(Arc<str>),
    /// The one that there is has expired or its time has not begun, and no new one could be had.
    #[error("the certificate of {0} is not valid by this machine's clock")]
    NotValid(Identity),
    /// It is being issued for longer than one waits.
    #[error("signing error: no certificate of {0} in time")]
    Slow(Identity),
    /// What was issued cannot be used.
    #[error("unusable certificate: {0}")]
    Unusable(Arc<str>),
    /// A certificate of a peer.
    #[error("identity verification error: {0}")]
    Peer(Arc<str>),
}

/// SHA-256, in lower-case hexadecimal digits: a certificate's fingerprint, for one.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}
