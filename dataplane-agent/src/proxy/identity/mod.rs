//! Certificates of the identities that the pods of this node have.

pub mod certs;
pub mod tls;

#[cfg(test)]
pub(crate) mod test_ca;

use std::sync::Arc;

pub use certs::{Certs, Issued, Issuer, WorkloadCertificate};

use crate::mesh::Identity;

/// Why there is no certificate, or why a peer's is rejected.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IdentityError {
    /// No pod of this node has the identity.
    #[error("workload is unknown: {0}")]
    Unknown(Identity),
    /// The issuer failed.
    #[error("signing error: {0}")]
    Signing(Arc<str>),
    /// The certificate has expired or is not valid yet, and no new one could be issued.
    #[error("the certificate of {0} is not valid by this machine's clock")]
    NotValid(Identity),
    /// Issuing takes longer than a connection waits.
    #[error("signing error: no certificate of {0} in time")]
    Slow(Identity),
    /// The issued certificate cannot be used.
    #[error("unusable certificate: {0}")]
    Unusable(Arc<str>),
    /// The certificate of a peer has no usable identity, or not an expected one.
    #[error("identity verification error: {0}")]
    Peer(Arc<str>),
}

/// Returns the SHA-256 in lower-case hexadecimal digits, for instance a certificate's fingerprint.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}
