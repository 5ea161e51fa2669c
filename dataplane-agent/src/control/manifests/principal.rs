//! Principals in a policy: `<trust domain>/ns/<namespace>/sa/<account>`, or a prefix or suffix of one with a
//! `*` for the rest.

use super::authorization_policy::text;
use crate::mesh::policy::StringMatch;

/// The name that stands for the mesh's own trust domain in policies, whatever it is called:
/// <https://istio.io/latest/docs/tasks/security/authorization/authz-td-migration/>.
const OWN: &str = "cluster.local";

/// Returns a principal as it is compared: without scheme, and with the real name of the own trust domain.
pub(super) fn principal(value: &str, trust_domain: &str) -> StringMatch {
    let value = value.strip_prefix("spiffe://").unwrap_or(value);
    match value.split_once('/') {
        Some((OWN, rest)) => text(&format!("{trust_domain}/{rest}")),
        _ => text(value),
    }
}

/// Returns `true` if a workload of the mesh may have the principal.
pub(super) fn may_be_here(principal: &StringMatch, trust_domain: &str) -> bool {
    let form = [Some(trust_domain), Some("ns"), None, Some("sa"), None];
    let backwards = [None, Some("sa"), None, Some("ns"), Some(trust_domain)];
    match principal {
        StringMatch::Presence => true,
        StringMatch::Exact(text) => {
            let parts = text.split('/');
            parts.clone().count() == form.len() && fits(parts, form, |part, word| part == word)
        }
        StringMatch::Prefix(text) => fits(text.split('/'), form, |cut, word| word.starts_with(cut)),
        StringMatch::Suffix(text) => {
            let parts = text.rsplit('/');
            fits(parts, backwards, |cut, word| word.ends_with(cut))
        }
    }
}

/// Returns `true` if a namespace or a service account may have a name with this text in it.
pub(super) fn may_be_name(text: &str) -> bool {
    let may_be =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    text.bytes().all(may_be)
}

/// Returns `true` if `parts` are the first parts of the form. The last one is compared with `is_cut`; where the
/// form has `None`, any name will do.
fn fits<'a>(
    parts: impl Iterator<Item = &'a str>,
    form: [Option<&str>; 5],
    is_cut: impl Fn(&str, &str) -> bool,
) -> bool {
    let parts: Vec<&str> = parts.collect();
    let last = parts.len() - 1;
    let fit = |(at, part): (usize, &&str)| match form.get(at) {
        Some(Some(word)) if at == last => is_cut(part, word),
        Some(Some(word)) => part == word,
        Some(None) => may_be_name(part) && (at == last || !part.is_empty()),
        None => false,
    };
    parts.iter().enumerate().all(fit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_local_is_the_meshs_own_trust_domain() {
        for (value, expected) in [
            ("cluster.local/ns/a/sa/b", "m.example/ns/a/sa/b"),
            ("spiffe://cluster.local/ns/a/sa/b", "m.example/ns/a/sa/b"),
            ("m.example/ns/a/sa/b", "m.example/ns/a/sa/b"),
            ("other/ns/a/sa/b", "other/ns/a/sa/b"),
            ("cluster.local.org/ns/a/sa/b", "cluster.local.org/ns/a/sa/b"),
        ] {
            let expected = StringMatch::Exact(expected.into());
            assert_eq!(principal(value, "m.example"), expected, "{value}");
        }
        let start = StringMatch::Prefix("m.example/".into());
        assert_eq!(principal("cluster.local/*", "m.example"), start);
        let start = StringMatch::Prefix("m.example/ns/a/".into());
        assert_eq!(principal("cluster.local/ns/a/*", "m.example"), start);
        let end = StringMatch::Suffix("/ns/a/sa/b".into());
        assert_eq!(principal("*/ns/a/sa/b", "m.example"), end);
    }

    #[test]
    fn what_no_workload_of_the_mesh_can_be_is_known() {
        for (value, may) in [
            ("*", true),
            ("m.example/ns/a/sa/b", true),
            ("cluster.local/ns/a/sa/b", true),
            ("m.example/*", true),
            ("m.ex*", true),
            ("m.example/ns/a/sa/b*", true),
            ("m.example/ns/a/s*", true),
            ("*/ns/a/sa/b", true),
            ("*example/ns/a/sa/b", true),
            ("*-sa", true),
            ("*a/b", true),
            ("other/ns/a/sa/b", false),
            ("other/*", false),
            ("m.example/sa/b", false),
            ("m.example/ns/a/sa/b/c", false),
            ("m.example/ns/a/sa/b/*", false),
            ("m.example/ns//sa/b", false),
            ("m.example/ns/A/sa/b", false),
            ("m.example/ns/a/sa/b ", false),
            ("sa/b", false),
            ("cluster.local*", false),
            ("*local/ns/a/sa/b", false),
            ("*/a/b", false),
            ("*/m.example/ns/a/sa/b", false),
        ] {
            let principal = principal(value, "m.example");
            assert_eq!(may_be_here(&principal, "m.example"), may, "{value}");
        }
    }
}
