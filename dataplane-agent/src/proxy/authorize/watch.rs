//! Permits that are in use. They are checked again whenever the mesh changes, each for the pod that it was made for: a
//! workload of the same uid and another identity is another pod of that name, whose policies say nothing of this one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::check::check_workload;
use super::{Denied, Direction, Instance, LocalPod, Permit, Resolved, Rule, question};
use crate::mesh::policy::Question;
use crate::mesh::{Identity, Mesh, MeshReader, Workload};

/// Authorizes connections, and checks permits again. Clones share the permits.
#[derive(Clone, Debug)]
pub struct Authorizer {
    mesh: MeshReader,
    live: Arc<Mutex<Live>>,
}

#[derive(Debug, Default)]
struct Live {
    next: u64,
    /// Permits by the enrolment of the pod that they are for, since a change is about some pods.
    pods: HashMap<Instance, PodPermits>,
}

#[derive(Debug)]
struct PodPermits {
    pod: Arc<LocalPod>,
    permits: HashMap<u64, Arc<LivePermit>>,
}

/// The properties of a permitted connection that are checked again, and the means to revoke it.
#[derive(Debug)]
struct LivePermit {
    source: Option<Identity>,
    source_ip: IpAddr,
    destination_ip: IpAddr,
    destination_port: u16,
    revoke: watch::Sender<bool>,
}

/// Completes when policy no longer allows a connection. The permit counts as in use until this is dropped.
#[derive(Debug)]
pub struct Revoked(Option<Registration>);

#[derive(Debug)]
struct Registration {
    instance: Instance,
    number: u64,
    live: Arc<Mutex<Live>>,
    revoked: watch::Receiver<bool>,
}

impl Authorizer {
    /// Creates an authorizer with the policies of the mesh.
    pub fn new(mesh: MeshReader) -> Self {
        Self {
            mesh,
            live: Arc::default(),
        }
    }

    /// Permits a connection if policy allows it.
    ///
    /// # Errors
    /// Policy does not allow it; the connection is given back.
    pub fn authorize<I>(&self, resolved: Resolved<I>) -> Result<Permit<I>, (Resolved<I>, Denied)> {
        let accepted = &resolved.accepted;
        if accepted.direction == Direction::Outbound {
            return Ok(Permit {
                resolved,
                rule: Rule::Destination,
                revoked: Revoked(None),
                _private: (),
            });
        }
        let asked = question(accepted);
        // It is registered before the decision, so that a change that comes meanwhile finds it.
        let revoked = self.register(&accepted.pod, &asked);
        let mesh = self.mesh.current();
        match check_workload(&mesh, workload_of(&mesh, &accepted.pod), &asked) {
            Ok(rule) => Ok(Permit {
                resolved,
                rule,
                revoked,
                _private: (),
            }),
            Err(denied) => Err((resolved, denied)),
        }
    }

    /// Checks permits again whenever the mesh changes for their workloads. Runs until it is dropped.
    pub async fn watch(self) {
        let mut mesh = self.mesh.clone();
        let mut checked = 0;
        loop {
            let now = mesh.changed().await;
            self.check_since(checked, &now);
            checked = now.generation();
        }
    }

    /// Checks the permits of workloads whose policies have changed since a generation.
    fn check_since(&self, checked: u64, mesh: &Mesh) {
        // The check runs without the lock, since connections wait for that. A permit that comes meanwhile is decided
        // by this mesh or a newer one.
        let pods: Vec<Arc<LocalPod>> = {
            let live = lock(&self.live);
            live.pods.values().map(|of| Arc::clone(&of.pod)).collect()
        };
        let changed = |pod: &&Arc<LocalPod>| {
            mesh.policy_since(&pod.uid)
                .is_none_or(|since| since > checked)
        };
        for pod in pods.iter().filter(changed) {
            for held in self.of(pod) {
                self.check_again(pod, &held, mesh);
            }
        }
    }

    fn check_again(&self, pod: &LocalPod, held: &LivePermit, mesh: &Mesh) {
        let asked = Question {
            source: held.source.as_ref(),
            source_ip: held.source_ip,
            destination_ip: held.destination_ip,
            destination_port: held.destination_port,
        };
        let check = |mesh: &Mesh| check_workload(mesh, workload_of(mesh, pod), &asked);
        // A permit that is newer than this mesh must not be revoked by it: the newest mesh decides.
        if check(mesh).is_err()
            && let Err(denied) = check(&self.mesh.current())
            && !held.revoke.send_replace(true)
        {
            tracing::info!(
                source = %held.source_ip,
                destination = %held.destination_ip,
                port = held.destination_port,
                %denied,
                "connection closed because it's no longer allowed after a policy update"
            );
        }
    }

    fn of(&self, pod: &LocalPod) -> Vec<Arc<LivePermit>> {
        let live = lock(&self.live);
        let of = live.pods.get(&pod.instance);
        of.map_or_else(Vec::new, |of| of.permits.values().cloned().collect())
    }

    fn register(&self, pod: &Arc<LocalPod>, asked: &Question<'_>) -> Revoked {
        let (revoke, revoked) = watch::channel(false);
        let held = Arc::new(LivePermit {
            source: asked.source.cloned(),
            source_ip: asked.source_ip,
            destination_ip: asked.destination_ip,
            destination_port: asked.destination_port,
            revoke,
        });
        let mut live = lock(&self.live);
        let number = live.next;
        live.next += 1;
        let of = live.pods.entry(pod.instance);
        let of = of.or_insert_with(|| PodPermits {
            pod: Arc::clone(pod),
            permits: HashMap::new(),
        });
        of.permits.insert(number, held);
        drop(live);
        Revoked(Some(Registration {
            instance: pod.instance,
            number,
            live: Arc::clone(&self.live),
            revoked,
        }))
    }
}

impl Revoked {
    /// Completes when policy no longer allows the connection.
    pub async fn wait(&mut self) {
        if let Some(registration) = &mut self.0
            && registration
                .revoked
                .wait_for(|revoked| *revoked)
                .await
                .is_ok()
        {
            return;
        }
        // Nobody can revoke it.
        std::future::pending::<()>().await;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut live = lock(&self.live);
        if let Some(of) = live.pods.get_mut(&self.instance) {
            of.permits.remove(&self.number);
            if of.permits.is_empty() {
                live.pods.remove(&self.instance);
            }
        }
    }
}

/// Returns a pod's workload; none if the mesh has another pod under its name.
fn workload_of<'a>(mesh: &'a Mesh, pod: &LocalPod) -> Option<&'a Workload> {
    mesh.workload_as(&pod.uid, &pod.identity).map(Arc::as_ref)
}

fn lock(live: &Mutex<Live>) -> std::sync::MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use futures_util::FutureExt;

    use super::super::Accepted;
    use super::*;
    use crate::mesh::policy::{Action, Clause, Match, Policy, PolicyScope, StringMatch};
    use crate::mesh::workload::tests::workload;
    use crate::mesh::{Delta, MeshWriter, store};

    fn deny_all() -> Policy {
        Policy {
            name: "deny-all".into(),
            namespace: "ns".into(),
            scope: PolicyScope::Namespace,
            action: Action::Deny,
            rules: vec![crate::mesh::policy::Rule::default()],
            dry_run: false,
        }
    }

    fn publish(writer: &MeshWriter, policies: Vec<Policy>) {
        writer.replace(Delta::of(vec![workload(&[])], Vec::new(), policies));
    }

    fn ask() -> Question<'static> {
        Question {
            source: None,
            source_ip: IpAddr::from([10, 0, 0, 9]),
            destination_ip: IpAddr::from([10, 0, 0, 1]),
            destination_port: 80,
        }
    }

    /// Returns an enrolment of the pod at 10.0.0.1.
    fn enrolled(pod: &Workload) -> Arc<LocalPod> {
        LocalPod::example(&pod.uid, pod.identity(), pod.addresses.clone())
    }

    fn is_revoked(revoked: &Revoked) -> bool {
        let registration = revoked.0.as_ref().expect("it is registered");
        *registration.revoked.borrow()
    }

    #[test]
    fn a_change_revokes_what_it_denies_and_a_dropped_permit_is_forgotten() {
        let (writer, reader) = store();
        publish(&writer, Vec::new());
        let authorizer = Authorizer::new(reader.clone());
        let revoked = authorizer.register(&enrolled(&workload(&[])), &ask());
        authorizer.check_since(0, &reader.current());
        assert!(!is_revoked(&revoked));
        publish(&writer, vec![deny_all()]);
        authorizer.check_since(0, &reader.current());
        assert!(is_revoked(&revoked));
        assert_eq!(lock(&authorizer.live).pods.len(), 1);
        drop(revoked);
        assert!(lock(&authorizer.live).pods.is_empty());
    }

    #[test]
    fn a_workload_that_is_gone_revokes() {
        let (writer, reader) = store();
        publish(&writer, Vec::new());
        let authorizer = Authorizer::new(reader.clone());
        let another = Workload {
            uid: "another".into(),
            ..workload(&[])
        };
        let revoked = authorizer.register(&enrolled(&another), &ask());
        authorizer.check_since(0, &reader.current());
        assert!(is_revoked(&revoked));
    }

    /// The mesh knows one pod of each name. What ran in an earlier one is decided by its own policies or not at all.
    #[test]
    fn a_pod_of_the_same_name_and_another_identity_decides_nothing_for_the_earlier_one() {
        let earlier = workload(&[]);
        let later = Workload {
            service_account: "other".into(),
            ..workload(&[])
        };
        let (writer, reader) = store();
        let publish = |pod: &Workload| {
            writer.replace(Delta::of(vec![pod.clone()], Vec::new(), Vec::new()));
        };
        publish(&earlier);
        let authorizer = Authorizer::new(reader.clone());
        let late = resolved(&reader, Direction::InboundPlain);
        let of_earlier = authorizer.register(&enrolled(&earlier), &ask());
        let of_later = authorizer.register(&enrolled(&later), &ask());
        publish(&later);
        authorizer.check_since(0, &reader.current());
        assert!(is_revoked(&of_earlier), "no policy is known of it");
        assert!(!is_revoked(&of_later));
        let (_, denied) = authorizer
            .authorize(late)
            .expect_err("it was resolved before");
        assert_eq!(denied, Denied::NoWorkload);
    }

    /// A pod that is made again under its name and account is decided alike, whichever address or node it has.
    #[test]
    fn a_pod_of_the_same_name_and_identity_elsewhere_cuts_nothing_of_the_earlier_one() {
        let (writer, reader) = store();
        publish(&writer, Vec::new());
        let authorizer = Authorizer::new(reader.clone());
        let revoked = authorizer.register(&enrolled(&workload(&[])), &ask());
        let again = Workload {
            addresses: vec![IpAddr::from([10, 0, 0, 2])],
            node: "another".into(),
            ..workload(&[])
        };
        // Somebody else has its address now, whom a policy protects.
        let at_its_address = Workload {
            uid: "c//Pod/ns/somebody".into(),
            ..workload(&["ns/deny-all"])
        };
        let selected = Policy {
            scope: PolicyScope::WorkloadSelector,
            ..deny_all()
        };
        let all = vec![again, at_its_address];
        writer.replace(Delta::of(all, Vec::new(), vec![selected]));
        authorizer.check_since(0, &reader.current());
        assert!(!is_revoked(&revoked));
        publish(&writer, vec![deny_all()]);
        authorizer.check_since(0, &reader.current());
        assert!(is_revoked(&revoked), "what says something of it holds");
    }

    /// Returns a connection of the pod at 10.0.0.1, which is reached in clear or connects itself.
    fn resolved(reader: &MeshReader, direction: Direction) -> Resolved<()> {
        let pod = workload(&[]);
        let accepted = Accepted {
            io: (),
            pod: enrolled(&pod),
            peer: SocketAddr::from(([10, 0, 0, 9], 4000)),
            destination: match direction {
                Direction::Outbound => SocketAddr::from(([192, 0, 2, 1], 80)),
                Direction::InboundPlain | Direction::InboundHbone { .. } => {
                    SocketAddr::from(([10, 0, 0, 1], 80))
                }
            },
            direction,
        };
        crate::proxy::resolve::resolve(reader, accepted).expect("it goes somewhere")
    }

    fn hbone() -> Direction {
        Direction::InboundHbone {
            at: [10, 0, 0, 1].into(),
            identity: Identity::new("td", "a", "s"),
            service: None,
        }
    }

    /// Returns a policy as STRICT makes it: peers without an identity are refused.
    fn strict() -> Policy {
        let only = Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        };
        Policy {
            scope: PolicyScope::WorkloadSelector,
            rules: vec![crate::mesh::policy::Rule {
                clauses: vec![Clause {
                    matches: vec![only],
                }],
            }],
            ..deny_all()
        }
    }

    #[tokio::test]
    async fn a_workload_that_turns_strict_revokes_what_is_in_clear_and_nothing_else() {
        let (writer, reader) = store();
        publish(&writer, vec![strict()]);
        let authorizer = Authorizer::new(reader.clone());
        let permit = |direction| {
            let permit = authorizer.authorize(resolved(&reader, direction));
            permit.expect("nobody names the policy")
        };
        let mut plain = permit(Direction::InboundPlain);
        let mut tunnelled = permit(hbone());
        let mut outbound = permit(Direction::Outbound);
        assert_eq!(outbound.rule, Rule::Destination);
        // The policy was there before; the workload changes.
        let named = vec![workload(&["ns/deny-all"])];
        writer.replace(Delta::of(named, Vec::new(), vec![strict()]));
        tokio::select! {
            () = authorizer.clone().watch() => unreachable!("it watches for ever"),
            () = plain.revoked.wait() => {}
        }
        plain.revoked.wait().await; // and again, at once
        assert!(tunnelled.revoked.wait().now_or_never().is_none());
        assert!(outbound.revoked.wait().now_or_never().is_none());
        let (_, denied) = authorizer
            .authorize(resolved(&reader, Direction::InboundPlain))
            .expect_err("it is STRICT now");
        assert_eq!(denied, Denied::Denied("ns/deny-all".into()));
        drop((plain, tunnelled, outbound));
        assert!(lock(&authorizer.live).pods.is_empty());
    }

    #[test]
    fn a_mesh_that_is_old_already_revokes_nothing() {
        let (writer, reader) = store();
        publish(&writer, vec![deny_all()]);
        let old = reader.current();
        publish(&writer, Vec::new());
        let authorizer = Authorizer::new(reader.clone());
        let permit = authorizer.authorize(resolved(&reader, Direction::InboundPlain));
        let mut permit = permit.expect("no policy is left");
        authorizer.check_since(0, &old);
        assert!(permit.revoked.wait().now_or_never().is_none());
    }

    /// A permit does not stay if the last mesh denies it, however permit and change meet.
    #[test]
    fn no_permit_survives_a_change_that_it_was_made_beside() {
        for _ in 0..200 {
            let (writer, reader) = store();
            publish(&writer, Vec::new());
            let authorizer = Authorizer::new(reader.clone());
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let start = std::sync::Barrier::new(5);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let watching = Box::pin(authorizer.clone().watch());
                    start.wait();
                    block_on(futures_util::future::select(watching, stopped));
                });
                let authorize = || {
                    let ready: Vec<_> = (0..20)
                        .map(|_| resolved(&reader, Direction::InboundPlain))
                        .collect();
                    start.wait();
                    let all = ready.into_iter();
                    all.filter_map(|one| authorizer.authorize(one).ok())
                        .collect::<Vec<_>>()
                };
                let workers = [(); 3].map(|()| scope.spawn(authorize));
                start.wait();
                publish(&writer, vec![deny_all()]);
                for mut permit in workers
                    .map(|worker| worker.join().expect("no panic"))
                    .into_iter()
                    .flatten()
                {
                    let revoked = permit.revoked.wait();
                    block_on(async { tokio::time::timeout(SOON, revoked).await })
                        .expect("somebody revokes it");
                }
                drop(stop);
            });
            assert!(lock(&authorizer.live).pods.is_empty());
        }
    }

    const SOON: std::time::Duration = std::time::Duration::from_secs(5);

    fn block_on<F: Future>(future: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.expect("a runtime").block_on(future)
    }
}
