//! Checks that translating step by step gives the same as translating at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::super::collection::{Change, Collection};
use super::super::object;
use super::super::translate::{MeshConfig, PodKey, Translation, translate};
use super::super::translated::{Stale, Translated};
use super::property::{object, word};
use crate::control::enrolled::Enrolled;
use crate::mesh::{Delta, Mesh};
use crate::sys::memory;

/// Returns all content of a mesh.
fn everything(mesh: &Mesh) -> Vec<String> {
    let workloads = mesh.workloads().map(|of| format!("{of:?}"));
    let services = mesh.services().map(|(_, of)| format!("{of:?}"));
    let policies = mesh.policies().map(|(_, of)| format!("{of:?}"));
    workloads.chain(services).chain(policies).collect()
}

fn sorted<'a>(all: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    all.cloned().collect()
}

/// A file's number, its object if it has one, and a pod whose enrolment changes.
type Step = (usize, Option<String>, Option<(&'static str, &'static str)>);

fn step() -> impl Strategy<Value = Step> {
    let enrols = prop::option::weighted(0.2, (word(), word()));
    (0..8_usize, prop::option::weighted(0.8, object()), enrols)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_changes_is_translated_to_what_it_would_be_at_once(
        steps in prop::collection::vec(step(), 1..25),
    ) {
        let config = MeshConfig::of_node("a");
        let mut collection = Collection::default();
        let mut translated = Translated::new(config.clone());
        let mut mesh = Mesh::default();
        let mut files: BTreeMap<usize, Arc<object::Parsed>> = BTreeMap::new();
        let mut pods: BTreeSet<PodKey> = BTreeSet::new();
        let mut stale = Stale::all();
        for (file, text, enrols) in steps {
            let parsed = text.and_then(|text| object::parse(Path::new("p.yaml"), &text).ok());
            let now = Arc::new(parsed.unwrap_or_default());
            // The folder refuses an object that is in another file.
            let others = files.iter().filter(|(other, _)| **other != file);
            let others: Vec<_> = others.flat_map(|(_, of)| &of.items).collect();
            if now.items.iter().any(|new| others.iter().any(|old| old.identity() == new.identity())) {
                continue;
            }
            let before = files.insert(file, Arc::clone(&now)).unwrap_or_default();
            let name = Path::new("p.yaml").into();
            let touched = collection.take(&[Change { file: name, before, now }]).objects;
            if let Some((namespace, name)) = enrols {
                let pod = PodKey { namespace: namespace.into(), name: name.into(), uid: "".into() };
                stale.pod(&pod.namespace, &pod.name);
                if !pods.remove(&pod) {
                    pods.insert(pod);
                }
            }
            let enrolled: Enrolled = pods.iter().cloned().collect();
            let objects = collection.objects();
            let captured = BTreeSet::new();
            let stale = std::mem::take(&mut stale);
            let delta = translated.update((objects, &touched), stale, (&enrolled, &captured), &mesh);
            mesh.apply(delta);

            let Translation { workloads, services, policies, mut local, problems } =
                translate(objects, &enrolled, &captured, &config);
            let at_once = Delta::of(workloads, services, policies);
            let at_once = at_once.from(&Mesh::default());
            let mut whole = Mesh::default();
            whole.apply(at_once);
            // Networks without workloads may stay, since nobody looks anything up in them.
            let networks: BTreeSet<_> = whole.workloads().map(|of| Arc::clone(&of.network)).collect();
            let mut now = mesh.clone();
            let mut pruned = Delta::default();
            for (key, service) in mesh.services() {
                let mut service = (**service).clone();
                service.vips.retain(|at| at.network.is_empty() || networks.contains(&at.network));
                pruned.services.insert(Arc::clone(key), Some(service));
            }
            now.apply(pruned);
            prop_assert_eq!(everything(&now), everything(&whole));
            let mut own: Vec<_> = translated.local().cloned().collect();
            own.sort_by(|one, other| one.uid.cmp(&other.uid));
            local.sort_by(|one, other| one.uid.cmp(&other.uid));
            prop_assert_eq!(own, local);
            prop_assert_eq!(sorted(translated.problems()), sorted(problems.iter()));
            for workload in whole.workloads() {
                prop_assert!(translated.has_workload(&workload.uid));
            }
        }
    }
}

#[test]
fn what_a_changed_pod_costs_does_not_grow_with_its_namespace() {
    let allocations = |pods: u32| {
        let pod = |number: u32, account: &str| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p-{number}, namespace: ns}}\n\
                 spec: {{nodeName: b, serviceAccountName: {account}}}\n\
                 status: {{podIPs: [{{ip: 10.0.{}.{}}}]}}\n",
                number / 250,
                number % 250
            )
        };
        let file = |number, account| {
            let text = pod(number, account);
            Arc::new(object::parse(Path::new("p.yaml"), &text).expect("a pod"))
        };
        let mut collection = Collection::default();
        let change = |number, before, now| Change {
            file: Path::new(&format!("{number}.yaml")).into(),
            before,
            now,
        };
        let all: Vec<_> = (0..pods)
            .map(|number| change(number, Arc::default(), file(number, "before")))
            .collect();
        let mut touched = collection.take(&all).objects;
        let mut translated = Translated::new(MeshConfig::of_node("a"));
        let mut mesh = Mesh::default();
        let mut taken = 0;
        for changed in [pods, 1] {
            let (enrolled, captured) = (Enrolled::default(), BTreeSet::new());
            let objects = (collection.objects(), &touched[..]);
            let before = memory::counted::taken().1;
            let here = (&enrolled, &captured);
            let delta = translated.update(objects, Stale::default(), here, &mesh);
            taken = memory::counted::taken().1 - before;
            assert_eq!(delta.len(), changed as usize);
            mesh.apply(delta);
            let one = change(1, file(1, "before"), file(1, "after"));
            touched = collection.take(&[one]).objects;
        }
        taken
    };
    let (few, many) = (allocations(10), allocations(2000));
    assert!(
        many <= few + 10,
        "{few} in a small one, {many} in a large one"
    );
}
