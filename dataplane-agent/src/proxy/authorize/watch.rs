//! Permits that are in use. They are checked again whenever the mesh changes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::check::check_workload;
use super::{Denied, Direction, Permit, Resolved, Rule, question};
use crate::mesh::policy::Question;
use crate::mesh::{Identity, Mesh, MeshReader};

/// Authorizes connections, and checks permits again. Clones share the permits.
#[derive(Clone, Debug)]
pub struct Authorizer {
    mesh: MeshReader,
    live: Arc<Mutex<Live>>,
}

#[derive(Debug, Default)]
struct Live {
    next: u64,
    /// Permits by the workload that they are for, since a change is about some workloads.
    permits: HashMap<Arc<str>, HashMap<u64, Arc<LivePermit>>>,
}

/// The properties of a permitted connection that are checked again, and the means to revoke it.
#[derive(Debug)]
struct LivePermit {
    workload: Arc<str>,
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
    workload: Arc<str>,
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
        let revoked = self.register(&accepted.pod.uid, &asked);
        let mesh = self.mesh.current();
        let target = mesh.workload(&accepted.pod.uid).map(Arc::as_ref);
        match check_workload(&mesh, target, &asked) {
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
        let all: Vec<Arc<str>> = lock(&self.live).permits.keys().cloned().collect();
        let changed = |uid: &Arc<str>| mesh.policy_since(uid).is_none_or(|since| since > checked);
        for held in all
            .into_iter()
            .filter(changed)
            .flat_map(|uid| self.of(&uid))
        {
            let asked = Question {
                source: held.source.as_ref(),
                source_ip: held.source_ip,
                destination_ip: held.destination_ip,
                destination_port: held.destination_port,
            };
            let check = |mesh: &Mesh| {
                let target = mesh.workload(&held.workload).map(Arc::as_ref);
                check_workload(mesh, target, &asked)
            };
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
    }

    fn of(&self, workload: &str) -> Vec<Arc<LivePermit>> {
        let live = lock(&self.live);
        let permits = live.permits.get(workload);
        permits.map_or_else(Vec::new, |of| of.values().cloned().collect())
    }

    fn register(&self, workload: &Arc<str>, asked: &Question<'_>) -> Revoked {
        let (revoke, revoked) = watch::channel(false);
        let held = Arc::new(LivePermit {
            workload: Arc::clone(workload),
            source: asked.source.cloned(),
            source_ip: asked.source_ip,
            destination_ip: asked.destination_ip,
            destination_port: asked.destination_port,
            revoke,
        });
        let mut live = lock(&self.live);
        let number = live.next;
        live.next += 1;
        let of = live.permits.entry(Arc::clone(workload)).or_default();
        of.insert(number, held);
        drop(live);
        Revoked(Some(Registration {
            workload: Arc::clone(workload),
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
        if let Some(of) = live.permits.get_mut(&self.workload) {
            of.remove(&self.number);
            if of.is_empty() {
                live.permits.remove(&self.workload);
            }
        }
    }
}

fn lock(live: &Mutex<Live>) -> std::sync::MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use futures_util::FutureExt;

    use super::super::{Accepted, LocalPod};
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

    #[test]
    fn a_change_revokes_what_it_denies_and_a_dropped_permit_is_forgotten() {
        let (writer, reader) = store();
        publish(&writer, Vec::new());
        let authorizer = Authorizer::new(reader.clone());
        let revoked = authorizer.register(&workload(&[]).uid, &ask());
        let is_revoked = |revoked: &Revoked| {
            revoked
                .0
                .as_ref()
                .is_some_and(|registration| *registration.revoked.borrow())
        };
        authorizer.check_since(0, &reader.current());
        assert!(!is_revoked(&revoked));
        publish(&writer, vec![deny_all()]);
        authorizer.check_since(0, &reader.current());
        assert!(is_revoked(&revoked));
        assert_eq!(lock(&authorizer.live).permits.len(), 1);
        drop(revoked);
        assert!(lock(&authorizer.live).permits.is_empty());
    }

    #[test]
    fn a_workload_that_is_gone_revokes() {
        let (writer, reader) = store();
        publish(&writer, Vec::new());
        let authorizer = Authorizer::new(reader.clone());
        let revoked = authorizer.register(&"another".into(), &ask());
        authorizer.check_since(0, &reader.current());
        assert!(
            revoked
                .0
                .as_ref()
                .is_some_and(|registration| *registration.revoked.borrow())
        );
    }

    /// Returns a connection of the pod at 10.0.0.1, which is reached in clear or connects itself.
    fn resolved(reader: &MeshReader, direction: Direction) -> Resolved<()> {
        let pod = workload(&[]);
        let accepted = Accepted {
            io: (),
            pod: LocalPod::example(&pod.uid, pod.identity(), pod.addresses.clone()),
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
        assert!(lock(&authorizer.live).permits.is_empty());
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
            assert!(lock(&authorizer.live).permits.is_empty());
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
