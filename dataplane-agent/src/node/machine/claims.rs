//! Decides which network namespace is which pod's, if several have an address. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The namespaces that each pod may be in, by their inode numbers.
pub(super) type Claims = BTreeMap<Arc<str>, BTreeSet<u64>>;

/// Why a pod has no namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unresolved {
    /// No namespace is left for it.
    None,
    /// More than one may be its own.
    Several(Vec<u64>),
    /// It may only be in this one, and so may another pod.
    Shared(u64, Arc<str>),
}

/// Gives each pod its namespace. A pod that can only be in one namespace gets that one, and no other pod
/// does; what is open after that stays open: nobody gets a namespace by a guess.
pub(super) fn resolve(mut claims: Claims) -> BTreeMap<Arc<str>, Result<u64, Unresolved>> {
    let mut resolved = BTreeMap::new();
    loop {
        let mut only: BTreeMap<u64, Vec<&Arc<str>>> = BTreeMap::new();
        for (uid, namespaces) in &claims {
            if let (Some(namespace), 1) = (namespaces.first(), namespaces.len()) {
                only.entry(*namespace).or_default().push(uid);
            }
        }
        let next = only
            .into_iter()
            .find_map(|(namespace, uids)| match uids.as_slice() {
                [uid] => Some((namespace, Arc::clone(uid))),
                _ => None,
            });
        let Some((namespace, uid)) = next else {
            break;
        };
        claims.remove(&uid);
        resolved.insert(uid, Ok(namespace));
        for namespaces in claims.values_mut() {
            namespaces.remove(&namespace);
        }
    }
    for (uid, namespaces) in &claims {
        let doubt = match namespaces.iter().collect::<Vec<_>>().as_slice() {
            [] => Unresolved::None,
            [namespace] => {
                let other = claims
                    .iter()
                    .find(|(other, theirs)| *other != uid && *theirs == namespaces);
                match other {
                    Some((other, _)) => Unresolved::Shared(**namespace, Arc::clone(other)),
                    None => Unresolved::Several(vec![**namespace]),
                }
            }
            several => Unresolved::Several(several.iter().map(|namespace| **namespace).collect()),
        };
        resolved.insert(Arc::clone(uid), Err(doubt));
    }
    resolved
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, btree_set};
    use proptest::prelude::*;

    use super::*;

    fn claims(of: &[(&str, &[u64])]) -> Claims {
        let claim = |(uid, namespaces): &(&str, &[u64])| {
            ((*uid).into(), namespaces.iter().copied().collect())
        };
        of.iter().map(claim).collect()
    }

    #[test]
    fn who_takes_anothers_address_gains_nothing_and_keeps_nobody_waiting() {
        // The thief's namespace, 2, has its own address and the victim's.
        let resolved = resolve(claims(&[("victim", &[1, 2]), ("thief", &[2])]));
        assert_eq!(resolved["victim"], Ok(1));
        assert_eq!(resolved["thief"], Ok(2));
        // The victim's own namespace is gone.
        let resolved = resolve(claims(&[("victim", &[2]), ("thief", &[2])]));
        assert_eq!(
            resolved["victim"],
            Err(Unresolved::Shared(2, "thief".into()))
        );
        // No other pod claims either of the namespaces.
        let resolved = resolve(claims(&[("victim", &[1, 2])]));
        assert_eq!(resolved["victim"], Err(Unresolved::Several(vec![1, 2])));
        assert_eq!(
            resolve(claims(&[("pod", &[])]))["pod"],
            Err(Unresolved::None)
        );
    }

    proptest! {
        #[test]
        fn no_two_pods_get_one_namespace_and_none_gets_one_that_it_may_not(
            claims in btree_map("[a-e]", btree_set(0..6_u64, 0..4), 0..5)
        ) {
            let claims: Claims = claims.into_iter().map(|(uid, of)| (uid.into(), of)).collect();
            let resolved = resolve(claims.clone());
            prop_assert!(resolved.keys().eq(claims.keys()));
            let given: Vec<u64> = resolved.values().filter_map(|of| of.clone().ok()).collect();
            let all: BTreeSet<u64> = given.iter().copied().collect();
            prop_assert_eq!(all.len(), given.len());
            for (uid, of) in &resolved {
                if let Ok(namespace) = of {
                    prop_assert!(claims[uid].contains(namespace));
                }
            }
        }
    }
}
