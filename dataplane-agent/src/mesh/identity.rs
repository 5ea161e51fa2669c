//! Identities: SPIFFE URIs of the form `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A longer URI is no identity (SPIFFE's own limit).
const MAX_LENGTH: usize = 2048;

/// A workload's parsed identity.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    trust_domain: Arc<str>,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl Identity {
    /// Returns the identity made of these parts.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }
    /// Returns its trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }
    /// Returns its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }
    /// Returns its service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

/// The error for a text that is not a valid identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid spiffe identity: {text}: {why}")]
pub struct NotAnIdentity {
    /// The first 256 characters of the text.
    pub text: String,
    /// What is wrong.
    pub why: &'static str,
}

impl FromStr for Identity {
    type Err = NotAnIdentity;

    /// Parses exactly `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
    fn from_str(text: &str) -> Result<Self, NotAnIdentity> {
        let wrong = |why| NotAnIdentity {
            text: text.chars().take(256).collect(),
            why,
        };
        if text.len() > MAX_LENGTH {
            return Err(wrong("is too long"));
        }
        let rest = text
            .strip_prefix("spiffe://")
            .ok_or_else(|| wrong("does not begin with spiffe://"))?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", account] = parts.as_slice() else {
            return Err(wrong(
                "is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<account>",
            ));
        };
        let is_part = |part: &str| {
            let fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            !part.is_empty() && part.bytes().all(fit) && part != "." && part != ".."
        };
        if ![trust_domain, namespace, account]
            .into_iter()
            .all(|part| is_part(part))
        {
            return Err(wrong(
                "has a part that is empty or has a character that none may have",
            ));
        }
        Ok(Self::new(trust_domain, namespace, account))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_one_form_is_an_identity() {
        for good in ["spiffe://cluster.local/ns/a/sa/b", "spiffe://t/ns/ns/sa/sa"] {
            assert_eq!(good.parse::<Identity>().expect(good).to_string(), good);
        }
        for bad in [
            "",
            "spiffe://",
            "spiffe://t/ns/a/sa",
            "spiffe://t/ns/a/sa/",
            "spiffe://t/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://t/ns/a/sa/b/",
            "spiffe://t/ns/a/sa/b/c",
            "spiffe://t/sa/b/ns/a",
            "SPIFFE://t/ns/a/sa/b",
            "https://t/ns/a/sa/b",
            "spiffe://t:1/ns/a/sa/b",
            "spiffe://u@t/ns/a/sa/b",
            "spiffe://t/ns/a/sa/b?q",
            "spiffe://t/ns/a/sa/b#f",
            "spiffe://t/ns/a/sa/%62",
            "spiffe://t/ns/../sa/b",
            "spiffe://t/ns/a b/sa/c",
            " spiffe://t/ns/a/sa/b",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_identity_is_as_long_as_spiffe_allows_and_no_longer() {
        let of_length = |length: usize| {
            let start = "spiffe://t/ns/a/sa/";
            format!("{start}{}", "b".repeat(length - start.len()))
        };
        let identity = of_length(2048).parse::<Identity>();
        assert_eq!(identity.expect("long enough").to_string().len(), 2048);
        let error = of_length(2049).parse::<Identity>().expect_err("too long");
        assert_eq!(error.why, "is too long");
        assert_eq!(error.text.len(), 256, "not all of it is told");
    }

    #[test]
    fn each_part_is_read_from_its_place() {
        let identity: Identity = "spiffe://t/ns/n/sa/s".parse().expect("an identity");
        let parts = (
            identity.trust_domain(),
            identity.namespace(),
            identity.service_account(),
        );
        assert_eq!(parts, ("t", "n", "s"));
        assert_eq!(format!("{identity:?}"), "spiffe://t/ns/n/sa/s");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed(td in "[a-z][a-z0-9.-]{0,20}", ns in "[a-z][a-z0-9-]{0,20}", sa in "[a-z][a-z0-9.-]{0,20}") {
            let identity = Identity::new(&td, &ns, &sa);
            prop_assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
        }
        #[test]
        fn no_text_panics_and_what_is_parsed_prints_itself(text in "(spiffe://)?[a-z/%.@:]{0,30}|.*") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
