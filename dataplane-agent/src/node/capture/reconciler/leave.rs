//! How a pod leaves: its capture stops, its connections end, and what was changed is undone.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::repair::LostParts;
use super::super::undo::UndoRecord;
use super::super::wanted::Desired;
use super::super::{CaptureError, enrol};
use super::{LINGER, Pod, PodPhase, RETRY, Reconciler, ServedPod, look};
use crate::mesh::workload::named;
use crate::seam::PodEvent;
use crate::sys::netns::Netns;

impl Reconciler {
    /// The first step of leaving: the kernel programs no longer capture new connections. All else stays until
    /// the pod has left, since packets that it sent by the capture route may still be under way, or be
    /// retransmitted.
    pub(super) fn stop_capture(&self, cookie: u64) {
        if let Err(error) = self.handle.maps().stop_capture(cookie) {
            tracing::error!(%error, netns = cookie, "pod stays captured");
        }
    }

    pub(super) fn leave(&mut self, cookie: u64) {
        self.stop_capture(cookie);
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return;
        };
        tracing::info!(pod = %named(&pod.uid), "pod leaves the mesh");
        let phase = std::mem::replace(&mut pod.phase, PodPhase::Unserved);
        pod.phase = match phase {
            PodPhase::Serving(served) => PodPhase::Lingering {
                served: Some(served),
                until: Instant::now() + LINGER,
            },
            PodPhase::Unserved => {
                pod.held.get_or_insert_default();
                PodPhase::Lingering {
                    served: None,
                    until: Instant::now() + LINGER,
                }
            }
            other => other,
        };
    }

    /// Captures a leaving pod again, as what is wanted now; the same listeners serve on. What fails of that is
    /// repaired like anything that a served pod has lost; the pod is captured meanwhile. One that this process has not
    /// served is unserved again, to be enrolled.
    pub(super) async fn revive(&mut self, want: Desired) -> Result<(), CaptureError> {
        let cookie = want.cookie;
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return Ok(());
        };
        let phase = std::mem::replace(&mut pod.phase, PodPhase::Unserved);
        let (mut served, told) = match phase {
            PodPhase::Lingering {
                served: Some(served),
                ..
            } => (served, false),
            PodPhase::Draining {
                served: Some(served),
                ..
            } => (served, true),
            PodPhase::Lingering { served: None, .. } | PodPhase::Draining { served: None, .. } => {
                return Ok(());
            }
            other => {
                pod.phase = other;
                return Ok(());
            }
        };
        let (uid, instance) = (pod.uid.clone(), served.instance);
        served.desired = want;
        let mut lost_parts = LostParts::default();
        let mut recaptured = self.recapture(&mut served, &mut lost_parts).await;
        if let Err(CaptureError::Stopping) = recaptured {
            return recaptured;
        }
        // A pod that is wanted is captured, whatever it lacks: looks put that back.
        if recaptured.is_err() {
            let captured = self.handle.maps().capture(cookie, None);
            recaptured = recaptured.and(captured);
        }
        let broken = look::report(named(&uid), &lost_parts, recaptured, None);
        self.handle.repairs.count(&lost_parts);
        served.schedule.done(broken);
        if let Some(pod) = self.pods.get_mut(&cookie) {
            pod.phase = PodPhase::Serving(served);
        }
        tracing::info!(pod = %named(&uid), "pod enrolled again");
        if told {
            self.send(PodEvent::Revive(instance)).await
        } else {
            Ok(())
        }
    }

    async fn recapture(
        &self,
        served: &mut ServedPod,
        lost_parts: &mut LostParts,
    ) -> Result<(), CaptureError> {
        let interfaces = enrol::interfaces(&served.desired.netns)?;
        let (addresses, _) =
            enrol::update_addresses(served.desired.address_owner(), &interfaces, &self.handle)?;
        let pin = self.pins.pod(served.desired.cookie);
        // The next look reports if it cannot be pinned.
        let _ = look::restore_program(served, &pin, lost_parts)?;
        let first = addresses.first().copied();
        served.send_addresses(addresses, &self.events).await?;
        let desired = &served.desired;
        let mut maps = self.handle.maps();
        maps.enrol(desired.cookie, first, &desired.groups)
    }

    /// Takes leaving pods one step further.
    pub(super) async fn advance_leaving(&mut self) -> Result<(), CaptureError> {
        let now = Instant::now();
        let cookies: Vec<u64> = self.pods.keys().copied().collect();
        for cookie in cookies {
            let Some(pod) = self.pods.get_mut(&cookie) else {
                continue;
            };
            match &mut pod.phase {
                PodPhase::Lingering { served, until } if *until <= now => {
                    let (told, idle) = oneshot::channel();
                    let event = match served {
                        Some(served) => PodEvent::Drain(served.instance, told),
                        None => PodEvent::DrainUnleased(cookie, told),
                    };
                    pod.phase = PodPhase::Draining {
                        served: served.take(),
                        idle,
                        // From when it was due, however long other pods have kept this one waiting.
                        until: *until + self.config.drain,
                    };
                    self.send(event).await?;
                }
                PodPhase::Draining { until, .. } if *until <= now => {
                    self.cut_connections(cookie).await?;
                }
                PodPhase::Cutting { done: None, .. } => pod.finish_cutting(),
                PodPhase::Cutting {
                    until: Some(until), ..
                } if *until <= now => {
                    tracing::error!(pod = %named(&pod.uid), "it is not known whether the pod's connections are cut; that is not waited for any longer");
                    pod.finish_cutting();
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the connections of a pod cut: those of this enrolment, and those that a proxy still has from an
    /// earlier node process. Does not wait for it: the pod's next step is decided when they are cut, or when that has
    /// taken longer than it may.
    pub(super) async fn cut_connections(&mut self, cookie: u64) -> Result<(), CaptureError> {
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return Ok(());
        };
        let phase = std::mem::replace(&mut pod.phase, PodPhase::Unserved);
        let served = phase.into_served();
        let (told, done) = oneshot::channel();
        let event = match &served {
            Some(served) => PodEvent::Down(served.instance, told),
            None => PodEvent::Clear(cookie, told),
        };
        pod.phase = PodPhase::Cutting {
            served,
            done: Some(done),
            until: self.config.cut.map(|cut| Instant::now() + cut),
        };
        self.send(event).await
    }

    pub(super) async fn undo(&mut self, cookie: u64) {
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return;
        };
        pod.phase = PodPhase::Unserved; // its listeners and program are gone
        let (uid, record, netns) = (pod.uid.clone(), pod.record.clone(), pod.netns.clone());
        match self.put_back(&record, netns.as_ref()).await {
            Ok(()) => {
                tracing::info!(pod = %named(&uid), "pod left the mesh");
                self.pods.remove(&cookie);
            }
            Err(error) => {
                tracing::warn!(pod = %named(&uid), %error, "pod's namespace is not as it was; it is tried again");
                self.undo_retry = Some(Instant::now() + RETRY);
            }
        }
    }

    /// The last step of leaving. The kernel forgets the pod only when all else is undone: until then it keeps
    /// the pod's connections inside.
    pub(super) async fn put_back(
        &self,
        record: &UndoRecord,
        netns: Option<&Netns>,
    ) -> Result<(), CaptureError> {
        enrol::undo(record, netns, &self.records, &self.pins).await?;
        self.handle.maps().forget(record.cookie)
    }
}

/// Is ready when a draining pod has no connections left, or a pod's connections have been cut.
pub(super) fn idle(pods: &mut BTreeMap<u64, Pod>, context: &mut Context<'_>) -> Poll<()> {
    for pod in pods.values_mut() {
        let told = match &mut pod.phase {
            PodPhase::Draining { idle, .. } => Some(idle),
            PodPhase::Cutting { done, .. } => done.as_mut(),
            _ => None,
        };
        if told.is_none_or(|told| Pin::new(told).poll(context).is_pending()) {
            continue;
        }
        match &mut pod.phase {
            PodPhase::Draining { until, .. } => *until = Instant::now(),
            PodPhase::Cutting { done, .. } => *done = None,
            _ => {}
        }
        return Poll::Ready(());
    }
    Poll::Pending
}
