//! Permits that are in use, asked about again whenever the mesh changes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::check::check_workload;
use super::policy::Question;
use super::{Denied, Direction, Mesh, MeshReader, Permit, Resolved, Rule, question};
use crate::identity::Identity;

/// The room. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Authorizer {
    mesh: MeshReader,
    live: Arc<Mutex<Live>>,
}

#[derive(Debug, Default)]
struct Live {
    next: u64,
    permits: HashMap<u64, Held>,
}

/// What is asked about a permit, again and again.
#[derive(Debug)]
struct Held {
    workload: Arc<str>,
    source: Option<Identity>,
    source_ip: IpAddr,
    destination_ip: IpAddr,
    destination_port: u16,
    revoke: watch::Sender<bool>,
}

/// Fires when policy no longer allows a connection. The permit counts as in use until it is dropped.
#[derive(Debug)]
pub struct Revoked(Option<Lease>);

#[derive(Debug)]
struct Lease {
    number: u64,
    live: Arc<Mutex<Live>>,
    revoked: watch::Receiver<bool>,
}

impl Authorizer {
    /// Over the mesh.
    pub fn new(mesh: MeshReader) -> Self {
        Self {
            mesh,
            live: Arc::default(),
        }
    }

    /// Whether a connection may be.
    ///
    /// # Errors
    /// It may not; it is given back.
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
        // Held before it is decided: a change that comes meanwhile finds it.
        let revoked = self.hold(&accepted.pod.uid, &asked);
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

    /// Asks about all permits again at every change of the mesh. Runs until it is dropped.
    pub async fn watch(self) {
        let mut mesh = self.mesh.clone();
        loop {
            let now = mesh.changed().await;
            self.check_all(&now);
        }
    }

    fn check_all(&self, mesh: &Mesh) {
        for held in lock(&self.live).permits.values() {
            let asked = Question {
                source: held.source.as_ref(),
                source_ip: held.source_ip,
                destination_ip: held.destination_ip,
                destination_port: held.destination_port,
            };
            let target = mesh.workload(&held.workload).map(Arc::as_ref);
            if let Err(denied) = check_workload(mesh, target, &asked)
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

    fn hold(&self, workload: &Arc<str>, asked: &Question<'_>) -> Revoked {
        let (revoke, revoked) = watch::channel(false);
        let held = Held {
            workload: Arc::clone(workload),
            source: asked.source.cloned(),
            source_ip: asked.source_ip,
            destination_ip: asked.destination_ip,
            destination_port: asked.destination_port,
            revoke,
        };
        let mut live = lock(&self.live);
        let number = live.next;
        live.next += 1;
        live.permits.insert(number, held);
        drop(live);
        Revoked(Some(Lease {
            number,
            live: Arc::clone(&self.live),
            revoked,
        }))
    }
}

impl Revoked {
    /// Completes when policy no longer allows the connection.
    pub async fn wait(&mut self) {
        if let Some(lease) = &mut self.0
            && lease.revoked.wait_for(|revoked| *revoked).await.is_ok()
        {
            return;
        }
        // Nobody can revoke it.
        std::future::pending::<()>().await;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.live).permits.remove(&self.number);
    }
}

fn lock(live: &Mutex<Live>) -> std::sync::MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::policy::{Action, Policy, PolicyScope};
    use super::*;
    use crate::resolve::mesh::{MeshWriter, store};
    use crate::resolve::workload::tests::workload;

    fn deny_all() -> Policy {
        Policy {
            name: "deny-all".into(),
            namespace: "ns".into(),
            scope: PolicyScope::Namespace,
            action: Action::Deny,
            rules: vec![super::super::policy::Rule::default()],
            dry_run: false,
        }
    }

    fn publish(writer: &MeshWriter, policies: Vec<Policy>) {
        writer.publish(Mesh::build(1, vec![workload(&[])], Vec::new(), policies));
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
        let revoked = authorizer.hold(&workload(&[]).uid, &ask());
        let is_revoked = |revoked: &Revoked| {
            revoked
                .0
                .as_ref()
                .is_some_and(|lease| *lease.revoked.borrow())
        };
        authorizer.check_all(&reader.current());
        assert!(!is_revoked(&revoked));
        publish(&writer, vec![deny_all()]);
        authorizer.check_all(&reader.current());
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
        let revoked = authorizer.hold(&"another".into(), &ask());
        authorizer.check_all(&reader.current());
        assert!(
            revoked
                .0
                .as_ref()
                .is_some_and(|lease| *lease.revoked.borrow())
        );
    }
}
