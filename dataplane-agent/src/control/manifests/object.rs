//! Kubernetes objects: parses a file's text into typed objects, and holds all files' objects ([`Objects`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use imbl::OrdMap;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::ManifestError;
use super::authorization_policy::AuthorizationPolicy;
use super::endpoint_slice::EndpointSlice;
use super::gateway::Gateway;
use super::peer_authentication::PeerAuthentication;
use super::pod::{self, Pod};
use super::service::Service;
use super::spelling;
use super::yaml::{self, Node, NodeError};
use crate::mesh::service::Age;

/// Namespace and name; the namespace is empty for objects of the whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

/// A kind and a key. Only one object may have both.
pub type Identity = (&'static str, Key);

/// The annotations that are used. Others are not kept: one of kubectl's is as large as all of its object.
const ANNOTATIONS: [&str; 5] = [
    pod::NETNS_ANNOTATION,
    pod::HASH_ANNOTATION,
    pod::MIRROR_ANNOTATION,
    pod::SIDECAR_ANNOTATION,
    spelling::DISTRIBUTION,
];

/// The fields of `metadata` that are used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Namespace and name.
    pub key: Key,
    /// The uid, which differs from that of an earlier object of the same name; empty if the manifest has none.
    pub uid: Arc<str>,
    /// Labels.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Those of [`ANNOTATIONS`] that it has.
    annotations: BTreeMap<String, String>,
    /// `creationTimestamp`, if the manifest has one.
    pub created: Option<OffsetDateTime>,
    /// `true` if it is being deleted.
    pub deleting: bool,
    /// `generateName`, the prefix of a generated name.
    pub generate_name: Option<String>,
    /// Kind and name of the owner that controls it.
    pub controller: Option<(String, String)>,
}

/// An object with its metadata. Both are shared with the file that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource<T> {
    /// The metadata.
    pub meta: Arc<Meta>,
    /// The fields of its kind.
    pub body: Arc<T>,
    /// The age that decides between objects where only one may apply: the oldest wins.
    pub age: Age,
}

/// Objects of one kind. Copies share their content.
pub type ByKey<T> = OrdMap<Key, Arc<Resource<T>>>;

/// All objects of a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Namespaces.
    pub namespaces: ByKey<()>,
    /// Service accounts.
    pub service_accounts: ByKey<()>,
    /// Nodes.
    pub nodes: ByKey<()>,
    /// Pods.
    pub pods: ByKey<Pod>,
    /// Services.
    pub services: ByKey<Service>,
    /// Endpoint slices.
    pub endpoint_slices: ByKey<EndpointSlice>,
    /// L4 (and L7) policies.
    pub authorization_policies: ByKey<AuthorizationPolicy>,
    /// PeerAuthentications.
    pub peer_authentications: ByKey<PeerAuthentication>,
    /// Gateways, among them waypoints.
    pub gateways: ByKey<Gateway>,
    /// HTTP routes, without their content.
    pub http_routes: ByKey<()>,
    /// Warnings about objects that are not read.
    pub warnings: Vec<String>,
}

impl Objects {
    /// Parses one file's text. Of the objects without a creation timestamp the first counts as the oldest.
    ///
    /// # Errors
    /// The text is not valid, or an object in it is not.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ManifestError> {
        let parsed = parse(file, text)?;
        let mut objects = Self {
            warnings: parsed.warnings,
            ..Self::default()
        };
        for (order, item) in (1..).zip(parsed.items) {
            let age = match item.meta.created {
                Some(created) => Age::new(created, 0),
                None => Age::new(OffsetDateTime::UNIX_EPOCH, order),
            };
            objects.insert(item, age);
        }
        Ok(objects)
    }

    /// Returns the value of a namespace's label; `None` if the namespace has no object.
    pub fn namespace_label(&self, namespace: &str, label: &str) -> Option<&str> {
        let key = Key {
            namespace: "".into(),
            name: namespace.into(),
        };
        self.namespaces
            .get(&key)?
            .meta
            .labels
            .get(label)
            .map(String::as_str)
    }

    /// Returns what the pods and services of a namespace depend on, as long as no endpoint is written by hand:
    /// its own objects, the policies of the mesh's `root` namespace, and the cluster-wide objects.
    pub(crate) fn of_namespace(&self, namespace: &Arc<str>, root: &str) -> Self {
        Self {
            pods: within(&self.pods, [namespace]),
            ..self.around_pods(namespace, root)
        }
    }

    /// Like [`Self::of_namespace`], with these of its pods alone.
    pub(crate) fn of_pods<'a>(
        &self,
        namespace: &Arc<str>,
        names: impl IntoIterator<Item = &'a Arc<str>>,
        root: &str,
    ) -> Self {
        let pods = names.into_iter().filter_map(|name| {
            let (namespace, name) = (Arc::clone(namespace), Arc::clone(name));
            let (key, pod) = self.pods.get_key_value(&Key { namespace, name })?;
            Some((key.clone(), Arc::clone(pod)))
        });
        Self {
            pods: pods.collect(),
            ..self.around_pods(namespace, root)
        }
    }

    /// Returns what is in [`Self::of_namespace`] besides pods.
    fn around_pods(&self, namespace: &Arc<str>, root: &str) -> Self {
        let root: Arc<str> = root.into();
        let labels = |of: &Arc<str>| {
            let key = Key {
                namespace: "".into(),
                name: Arc::clone(of),
            };
            self.namespaces.get_key_value(&key)
        };
        let labels = [namespace, &root].into_iter().filter_map(labels);
        Self {
            namespaces: labels.map(|(key, of)| (key.clone(), of.clone())).collect(),
            nodes: self.nodes.clone(),
            gateways: self.gateways.clone(),
            service_accounts: within(&self.service_accounts, [namespace]),
            pods: ByKey::new(),
            services: within(&self.services, [namespace]),
            endpoint_slices: within(&self.endpoint_slices, [namespace]),
            authorization_policies: within(&self.authorization_policies, [namespace, &root]),
            peer_authentications: within(&self.peer_authentications, [namespace, &root]),
            http_routes: within(&self.http_routes, [namespace]),
            warnings: Vec::new(),
        }
    }

    /// Returns the namespaces that have an object, or that objects are in.
    pub(crate) fn all_namespaces(&self) -> BTreeSet<Arc<str>> {
        let own = self.namespaces.keys().map(|key| &key.name);
        let pods = self.pods.keys().chain(self.services.keys());
        let slices = pods.chain(self.endpoint_slices.keys());
        let policies = slices.chain(self.authorization_policies.keys());
        let all = policies.chain(self.peer_authentications.keys());
        own.chain(all.map(|key| &key.namespace)).cloned().collect()
    }

    pub(crate) fn remove(&mut self, item: &Item) {
        let key = &item.meta.key;
        match &item.body {
            Body::Namespace => drop(self.namespaces.remove(key)),
            Body::ServiceAccount => drop(self.service_accounts.remove(key)),
            Body::Node => drop(self.nodes.remove(key)),
            Body::HttpRoute => drop(self.http_routes.remove(key)),
            Body::Pod(_) => drop(self.pods.remove(key)),
            Body::Service(_) => drop(self.services.remove(key)),
            Body::EndpointSlice(_) => drop(self.endpoint_slices.remove(key)),
            Body::AuthorizationPolicy(_) => drop(self.authorization_policies.remove(key)),
            Body::PeerAuthentication(_) => drop(self.peer_authentications.remove(key)),
            Body::Gateway(_) => drop(self.gateways.remove(key)),
        }
    }

    pub(crate) fn insert(&mut self, item: Item, age: Age) {
        fn put<T>(map: &mut ByKey<T>, meta: Arc<Meta>, body: Arc<T>, age: Age) {
            let key = meta.key.clone();
            map.insert(key, Arc::new(Resource { meta, body, age }));
        }
        let meta = item.meta;
        match item.body {
            Body::Namespace => put(&mut self.namespaces, meta, Arc::new(()), age),
            Body::ServiceAccount => put(&mut self.service_accounts, meta, Arc::new(()), age),
            Body::Node => put(&mut self.nodes, meta, Arc::new(()), age),
            Body::HttpRoute => put(&mut self.http_routes, meta, Arc::new(()), age),
            Body::Pod(body) => put(&mut self.pods, meta, body, age),
            Body::Service(body) => put(&mut self.services, meta, body, age),
            Body::EndpointSlice(body) => put(&mut self.endpoint_slices, meta, body, age),
            Body::AuthorizationPolicy(body) => {
                put(&mut self.authorization_policies, meta, body, age);
            }
            Body::PeerAuthentication(body) => put(&mut self.peer_authentications, meta, body, age),
            Body::Gateway(body) => put(&mut self.gateways, meta, body, age),
        }
    }
}

/// Returns the objects in one namespace, in the order of their names.
pub(crate) fn all_in<'a, T>(
    all: &'a ByKey<T>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Key, &'a Arc<Resource<T>>)> + use<'a, T> {
    let namespace: Arc<str> = namespace.into();
    let from = Key {
        namespace: Arc::clone(&namespace),
        name: "".into(),
    };
    let there = all.range(from..);
    there.take_while(move |(key, _)| key.namespace == namespace)
}

fn within<'a, T>(all: &ByKey<T>, namespaces: impl IntoIterator<Item = &'a Arc<str>>) -> ByKey<T> {
    let of = namespaces.into_iter();
    let all = of.flat_map(|namespace| all_in(all, namespace));
    all.map(|(key, of)| (key.clone(), Arc::clone(of))).collect()
}

/// One object of a file. Copies share its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) line: u64,
    pub(crate) meta: Arc<Meta>,
    pub(crate) body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Namespace,
    ServiceAccount,
    Node,
    HttpRoute,
    Pod(Arc<Pod>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    PeerAuthentication(Arc<PeerAuthentication>),
    Gateway(Arc<Gateway>),
}

/// The content of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) items: Vec<Item>,
    pub(crate) warnings: Vec<String>,
    /// The objects of kinds that are not read.
    passed_over: Vec<PassedOver>,
    /// `true` if an empty List says that the file is empty on purpose.
    nothing: bool,
}

/// An object of a kind that is not read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PassedOver {
    line: u64,
    api_version: String,
    kind: String,
    /// Namespace and name. A cluster-wide object counts as one of the default namespace.
    key: Key,
}

impl Parsed {
    /// Returns `true` if `self` has all objects of `other`, by kind and key.
    pub(crate) fn has_all_of(&self, other: &Self) -> bool {
        other.items.iter().all(|item| self.has(item))
    }

    fn has(&self, item: &Item) -> bool {
        self.items
            .iter()
            .any(|own| own.identity() == item.identity())
    }

    /// Checks that this content may replace what the file had before. An object that is not read may have come
    /// in the place of one that was: it has that one's name, or nothing that is read is left. This is no
    /// request to remove the old one, but what a slip in a kind or a group looks like.
    ///
    /// # Errors
    /// There is such an object.
    pub(crate) fn may_follow(&self, before: &Self, file: &Path) -> Result<(), ManifestError> {
        let was_there = |new: &&PassedOver| {
            let mut others = before.passed_over.iter();
            others.any(|old| (&old.kind, &old.key) == (&new.kind, &new.key))
        };
        let came = || self.passed_over.iter().filter(|new| !was_there(new));
        for item in before.items.iter().filter(|item| !self.has(item)) {
            let (was, key) = item.identity();
            let is_named = |new: &&PassedOver| {
                let same = key.namespace.is_empty() || new.key.namespace == key.namespace;
                same && new.key.name == key.name
            };
            let is_all = self.items.is_empty() && !self.nothing;
            let Some(new) = came().find(|new| is_all || is_named(new)) else {
                continue;
            };
            let PassedOver {
                line,
                api_version,
                kind,
                ..
            } = new;
            let what = format!(
                "{api_version} {kind} is not read, and stands in the place of {was} {key}; to remove that, \
                 delete the file or put an empty List in it"
            );
            return Err(ManifestError {
                line: Some(*line),
                ..ManifestError::of_file(file, what)
            });
        }
        Ok(())
    }
}

impl Item {
    /// Returns its kind and key.
    pub(crate) fn identity(&self) -> Identity {
        (self.body.kind(), self.meta.key.clone())
    }

    /// Returns `true` if it has the same content as `other`; lines do not matter.
    pub(crate) fn says(&self, other: &Self) -> bool {
        self.meta == other.meta && self.body == other.body
    }
}

impl Body {
    fn kind(&self) -> &'static str {
        match self {
            Body::Namespace => "Namespace",
            Body::ServiceAccount => "ServiceAccount",
            Body::Node => "Node",
            Body::HttpRoute => "HTTPRoute",
            Body::Pod(_) => "Pod",
            Body::Service(_) => "Service",
            Body::EndpointSlice(_) => "EndpointSlice",
            Body::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Body::PeerAuthentication(_) => "PeerAuthentication",
            Body::Gateway(_) => "Gateway",
        }
    }
}

/// Parses one file's text.
pub(crate) fn parse(file: &Path, text: &str) -> Result<Parsed, ManifestError> {
    let mut parsed = Parsed::default();
    let documents = yaml::documents(text).map_err(|error| ManifestError::at(file, error))?;
    // kubectl refuses such a file too. A crash or a full disk may have emptied it, and what is commented
    // out may be a policy. To mean "nothing", a file has an empty List.
    if documents.is_empty() {
        return Err(ManifestError::of_file(
            file,
            "has no objects in it; delete it to remove what it said",
        ));
    }
    for document in documents {
        take(file, &document, 0, &mut parsed).map_err(|error| ManifestError::at(file, error))?;
    }
    let mut seen = BTreeMap::new();
    for item in &parsed.items {
        let (kind, key) = item.identity();
        if let Some(first) = seen.insert((kind, key.clone()), item.line) {
            return Err(ManifestError {
                line: Some(item.line),
                ..ManifestError::of_file(file, format_args!("{kind} {key} is also on line {first}"))
            });
        }
    }
    Ok(parsed)
}

/// Nesting depth of lists. Real ones are not nested; the bound protects our stack from hostile files.
const LIST_DEPTH: usize = 4;

fn take(file: &Path, node: &Node, depth: usize, parsed: &mut Parsed) -> Result<(), NodeError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        api_version: String,
        kind: String,
    }
    let head: Head = node.read()?;
    let known = spelling::kind(&head.api_version, &head.kind)
        .map_err(|(field, what)| wrong(node, field, what))?;
    let group = head
        .api_version
        .rsplit_once('/')
        .map_or("", |(group, _)| group);

    let of_list = node.field("items");
    if head.kind == spelling::LIST && of_list.is_none() {
        return Err(wrong(
            node,
            "items",
            "a List without items; an empty one says `items: []`",
        ));
    }
    if let Some(items) = of_list.filter(|_| head.kind.ends_with(spelling::LIST)) {
        let items = items
            .list()
            .filter(|_| depth < LIST_DEPTH)
            .ok_or_else(|| NodeError {
                line: Some(items.line),
                field: "items".into(),
                what: "expected a list of objects".into(),
            })?;
        parsed.nothing |= items.is_empty();
        for (at, item) in items.iter().enumerate() {
            take(file, item, depth + 1, parsed).map_err(|e| e.below(&format!("items[{at}]")))?;
        }
        return Ok(());
    }

    if known {
        spelling::check(node, &head.kind)?;
    }
    let body = match (group, head.kind.as_str()) {
        ("", "Namespace") => Body::Namespace,
        ("", "ServiceAccount") => Body::ServiceAccount,
        ("", "Node") => Body::Node,
        ("gateway.networking.k8s.io", "HTTPRoute") => Body::HttpRoute,
        ("", "Pod") => Body::Pod(Pod::read(node)?.into()),
        ("", "Service") => Body::Service(Service::read(node)?.into()),
        ("discovery.k8s.io", "EndpointSlice") => {
            Body::EndpointSlice(EndpointSlice::read(node)?.into())
        }
        ("security.istio.io", "AuthorizationPolicy") => {
            Body::AuthorizationPolicy(AuthorizationPolicy::read(node)?.into())
        }
        ("security.istio.io", "PeerAuthentication") => {
            Body::PeerAuthentication(PeerAuthentication::read(node)?.into())
        }
        ("gateway.networking.k8s.io", "Gateway") => Body::Gateway(Gateway::read(node)?.into()),
        (group, kind) => {
            parsed.warnings.push(passed_over(file, node, group, kind)?);
            parsed.passed_over.push(PassedOver {
                line: node.line,
                kind: kind.to_owned(),
                key: Meta::key(node).unwrap_or_default(),
                api_version: head.api_version.clone(),
            });
            return Ok(());
        }
    };
    let meta = Meta::read(node, matches!(body, Body::Namespace | Body::Node))?;
    parsed.items.push(Item {
        line: node.line,
        meta: meta.into(),
        body,
    });
    Ok(())
}

/// Returns the warning for an object that is not read. It must have a name, so that an object with a
/// half-written kind is not taken for one of another kind.
fn passed_over(file: &Path, node: &Node, group: &str, kind: &str) -> Result<String, NodeError> {
    let name = node
        .field("metadata")
        .and_then(|m| m.field("name"))
        .and_then(Node::text);
    if name.is_none() && kind != "Kustomization" {
        return Err(wrong(
            node,
            "metadata.name",
            format_args!("a {kind} without a name"),
        ));
    }
    let why = match (group, kind) {
        ("apps", "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet")
        | ("batch", "Job" | "CronJob")
        | ("", "ReplicationController") => "makes no pods here, write them as Pod",
        _ => "is of a kind that is not read, passed over",
    };
    let (file, line, name) = (file.display(), node.line, name.unwrap_or_default());
    Ok(format!("{file}:{line}: {kind} {name} {why}"))
}

impl Meta {
    /// Returns the namespace and name of an object that is not read.
    fn key(node: &Node) -> Option<Key> {
        let meta = node.field("metadata")?;
        let text = |name| meta.field(name).and_then(Node::text);
        Some(Key {
            namespace: text("namespace").unwrap_or("default").into(),
            name: text("name")?.into(),
        })
    }

    fn read(node: &Node, cluster_wide: bool) -> Result<Self, NodeError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            name: String,
            #[serde(default)]
            namespace: String,
            #[serde(default)]
            uid: String,
            #[serde(default)]
            labels: BTreeMap<String, String>,
            #[serde(default)]
            annotations: BTreeMap<String, String>,
            creation_timestamp: Option<String>,
            deletion_timestamp: Option<String>,
            generate_name: Option<String>,
            #[serde(default)]
            owner_references: Vec<Owner>,
        }
        #[derive(Deserialize)]
        struct Owner {
            kind: String,
            name: String,
            #[serde(default)]
            controller: bool,
        }
        #[derive(Deserialize)]
        struct Outer {
            metadata: Raw,
        }
        let raw = node.read::<Outer>()?.metadata;
        let namespace = match (cluster_wide, raw.namespace.as_str()) {
            (true, _) => "",
            (false, "") => "default",
            (false, namespace) => namespace,
        };
        // Names become parts of identities and keys, where a slash would change the meaning.
        if !is_name(&raw.name) {
            return Err(wrong(
                node,
                "metadata.name",
                format_args!("`{}` is not a name", raw.name),
            ));
        }
        if !namespace.is_empty() && !is_label(namespace) {
            let what = format_args!("`{namespace}` is not a namespace");
            return Err(wrong(node, "metadata.namespace", what));
        }
        let created = match &raw.creation_timestamp {
            None => None,
            Some(text) => Some(OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
                wrong(
                    node,
                    "metadata.creationTimestamp",
                    format_args!("`{text}` is not a time"),
                )
            })?),
        };
        Ok(Self {
            key: Key {
                namespace: namespace.into(),
                name: raw.name.into(),
            },
            uid: raw.uid.into(),
            labels: raw.labels.into(),
            annotations: {
                let all = raw.annotations.into_iter();
                let used = all.filter(|(name, _)| ANNOTATIONS.contains(&name.as_str()));
                used.collect()
            },
            created,
            deleting: raw.deletion_timestamp.is_some(),
            generate_name: raw.generate_name,
            controller: raw
                .owner_references
                .into_iter()
                .find(|owner| owner.controller)
                .map(|owner| (owner.kind, owner.name)),
        })
    }

    /// Returns the value of an annotation, which is one of those that are kept.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        debug_assert!(ANNOTATIONS.contains(&name), "{name} is not kept");
        self.annotations.get(name).map(String::as_str)
    }

    /// Returns a label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }
}

/// Builds the error for the field at `path` of the object `node`.
pub(crate) fn wrong(node: &Node, path: &str, what: impl std::fmt::Display) -> NodeError {
    NodeError {
        line: Some(node.line_at(path)),
        field: path.into(),
        what: what.to_string(),
    }
}

/// Returns `true` if `name` is a DNS subdomain, as Kubernetes requires of names.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 253 && name.split('.').all(is_label_part)
}

fn is_label(name: &str) -> bool {
    name.len() <= 63 && is_label_part(name)
}

fn is_label_part(part: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !part.is_empty() && part.chars().all(inner) && !part.starts_with('-') && !part.ends_with('-')
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Returns `true` if `labels` contain all of `selector`.
pub(crate) fn selects(
    selector: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    selector
        .iter()
        .all(|(name, value)| labels.get(name) == Some(value))
}
