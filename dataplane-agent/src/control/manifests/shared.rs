//! One copy of what objects have in common: the pods of a deployment have the same labels, account and namespace.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::object::{Body, Parsed};
use crate::mesh::interner::Copies;

/// One copy of each value.
#[derive(Debug, Default)]
pub(super) struct SharedParts {
    texts: Copies<str>,
    labels: Copies<BTreeMap<String, String>>,
}

impl SharedParts {
    /// Replaces what a file's objects have in common with each other, and with those of other files, by one copy.
    pub(super) fn share(&mut self, parsed: &mut Parsed) {
        for item in &mut parsed.items {
            if let Some(meta) = Arc::get_mut(&mut item.meta) {
                self.texts.share(&mut meta.key.namespace);
                self.labels.share(&mut meta.labels);
                if meta.uid.is_empty() {
                    self.texts.share(&mut meta.uid);
                }
            }
            if let Body::Pod(pod) = &mut item.body
                && let Some(pod) = Arc::get_mut(pod)
            {
                self.texts.share(&mut pod.node);
                self.texts.share(&mut pod.service_account);
            }
        }
    }
}
