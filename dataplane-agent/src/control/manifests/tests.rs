//! Tests of the folder and of the translation.

mod applies;
mod folder;
mod golden;
mod parse;
mod policies;
mod property;
mod services;
mod translated;
mod workloads;

use std::collections::BTreeSet;
use std::path::Path;

use super::super::conflicts;
use super::super::enrolled::Enrolled;
use super::object::{self, Objects};
use super::translate::{MeshConfig, Translation, translate};
use crate::mesh::policy::Policy;

fn objects(text: &str) -> Objects {
    Objects::parse(Path::new("test.yaml"), text).expect("the test's own manifests")
}

fn refusal(text: &str) -> String {
    object::parse(Path::new("test.yaml"), text)
        .expect_err("is to be refused")
        .to_string()
}

fn translation(text: &str) -> Translation {
    translation_in(&MeshConfig::of_node("here"), text)
}

fn translation_in(mesh: &MeshConfig, text: &str) -> Translation {
    let objects = objects(text);
    let (enrolled, captured) = (Enrolled::default(), BTreeSet::new());
    let mut made = translate(&objects, &enrolled, &captured, mesh);
    let (workloads, services) = (made.workloads.iter(), made.services.iter());
    conflicts::report(workloads, services, &mut made.problems);
    made.problems.extend(objects.warnings);
    made
}

fn policy<'a>(translation: &'a Translation, key: &str) -> &'a Policy {
    translation
        .policies
        .iter()
        .find(|policy| policy.key() == key)
        .expect("the policy is there")
}
