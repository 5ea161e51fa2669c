//! Tests which identities get a certificate, how often it is requested, and which one is used while the issuer fails.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use super::super::test_ca::{Ca, uri};
use super::*;

const DAY: time::Duration = time::Duration::DAY;

thread_local! {
    /// Time by which the clock of a test is ahead; each test has a thread of its own.
    static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn now() -> SystemTime {
    SystemTime::now() + AHEAD.get()
}

/// An issuer that answers as often as it is permitted, counts its requests, and can refuse.
struct Gate {
    ca: Ca,
    life: time::Duration,
    open: Semaphore,
    refuses: AtomicBool,
    asked: Mutex<BTreeMap<Identity, usize>>,
}

impl Gate {
    fn new(life: time::Duration, open: usize) -> Arc<Self> {
        Arc::new(Self {
            ca: Ca::new(),
            life,
            open: Semaphore::new(open),
            refuses: AtomicBool::default(),
            asked: Mutex::default(),
        })
    }

    fn asked(&self) -> BTreeMap<Identity, usize> {
        lock(&self.asked).clone()
    }
}

impl Issuer for Gate {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        *lock(&self.asked).entry(identity.clone()).or_default() += 1;
        Box::pin(async move {
            self.open.acquire().await.expect("it is open").forget();
            match self.refuses.load(Ordering::Relaxed) {
                true => Err(IdentityError::Signing("refused".into())),
                false => {
                    let names = vec![uri(&identity.to_string())];
                    Ok(self.ca.sign_at(now().into(), names, self.life))
                }
            }
        })
    }
}

fn pod(number: usize) -> Identity {
    Identity::new("td", "ns", &format!("pod{number}"))
}

fn held(gate: &Arc<Gate>, count: usize) -> Certs {
    let issuer: Arc<dyn Issuer> = gate.clone();
    let mut certs = Certs::new(issuer);
    certs.clock = now;
    for number in 0..count {
        certs.retain(&pod(number));
    }
    certs
}

/// Runs a test beside the task that issues certificates.
async fn beside_rotate(certs: &Certs, test: impl Future<Output = ()>) {
    tokio::select! {
        () = certs.clone().rotate() => {}
        done = timeout(Duration::from_secs(60), test) => done.expect("it ends"),
    }
}

/// Lets other tasks run until `is` holds.
async fn eventually(is: impl Fn() -> bool) {
    while !is() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn all_who_wait_share_one_certificate_and_one_who_leaves_stops_nothing() {
    let gate = Gate::new(DAY, 0);
    let certs = held(&gate, 1);
    let test = async {
        let who = pod(0);
        {
            let mut leaves = Box::pin(certs.current(&who));
            assert!(leaves.as_mut().now_or_never().is_none());
            eventually(|| gate.asked().len() == 1).await;
        }
        let wait = join_all((0..50).map(|_| certs.current(&who)));
        let open = async {
            tokio::task::yield_now().await;
            gate.open.add_permits(100);
        };
        let (all, ()) = tokio::join!(wait, open);
        let first = all[0].as_ref().expect("a certificate");
        for one in &all {
            let one = one.as_ref().expect("a certificate");
            assert!(Arc::ptr_eq(one, first), "one for all");
        }
        assert_eq!(gate.asked(), BTreeMap::from([(who.clone(), 1)]));
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn a_waiter_is_not_who_issues() {
    let gate = Gate::new(DAY, 0);
    let certs = held(&gate, 1);
    let who = pod(0);
    // Nothing is issued yet; a waiter that comes and goes leaves nothing half done.
    assert!(certs.current(&who).now_or_never().is_none());
    gate.open.add_permits(100);
    let test = async {
        certs.current(&who).await.expect("a certificate");
        assert_eq!(gate.asked(), BTreeMap::from([(who.clone(), 1)]));
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn certificates_are_issued_beside_each_other_up_to_a_bound_and_each_once() {
    let gate = Gate::new(DAY, 0);
    let certs = held(&gate, 3 * ISSUING);
    let test = async {
        eventually(|| gate.asked().len() >= ISSUING).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(gate.asked().len(), ISSUING, "no more at once");
        gate.open.add_permits(100);
        for number in 0..3 * ISSUING {
            certs.current(&pod(number)).await.expect("a certificate");
        }
        assert!(gate.asked().values().all(|times| *times == 1));
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn a_renewal_that_fails_keeps_the_old_certificate_until_it_ends_and_is_told() {
    let gate = Gate::new(time::Duration::seconds(4), 100);
    let certs = held(&gate, 1);
    let who = pod(0);
    let test = async {
        let first = certs.current(&who).await.expect("a certificate");
        gate.refuses.store(true, Ordering::Relaxed);
        eventually(|| certs.list()[0].failed.is_some()).await;
        let kept = certs.current(&who).await.expect("the old one");
        assert!(Arc::ptr_eq(&first, &kept));
        eventually(|| !first.is_valid(now())).await;
        let error = certs.current(&who).await.expect_err("it has ended");
        assert!(matches!(error, IdentityError::Signing(_)), "{error}");
        assert!(
            gate.asked()[&who] <= 5,
            "pauses between: {:?}",
            gate.asked()
        );
        gate.refuses.store(false, Ordering::Relaxed);
        eventually(|| certs.list()[0].failed.is_none()).await;
        certs.current(&who).await.expect("a new one");
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn what_is_forgotten_while_it_is_issued_does_not_come_back() {
    let gate = Gate::new(DAY, 0);
    let certs = held(&gate, 1);
    let who = pod(0);
    let test = async {
        eventually(|| gate.asked().len() == 1).await;
        let waits = certs.current(&who);
        let forget = async {
            tokio::task::yield_now().await;
            certs.release(&who);
        };
        let (told, ()) = tokio::join!(waits, forget);
        assert!(matches!(told, Err(IdentityError::Unknown(_))), "{told:?}");
        gate.open.add_permits(1);
        eventually(|| gate.open.available_permits() == 0).await;
        assert!(certs.list().is_empty());
        // An identity that is retained again gets a new certificate.
        certs.retain(&who);
        gate.open.add_permits(1);
        certs.current(&who).await.expect("a certificate");
        assert_eq!(gate.asked()[&who], 2);
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn who_waits_for_an_issuer_that_says_nothing_is_told() {
    let certs = Certs {
        wait: Duration::from_millis(5),
        ..held(&Gate::new(DAY, 0), 1)
    };
    let test = async {
        let told = certs.current(&pod(0)).await;
        assert!(matches!(told, Err(IdentityError::Slow(_))), "{told:?}");
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn a_certificate_that_has_ended_as_it_comes_is_a_failure_and_is_not_asked_for_at_once_again()
{
    let gate = Gate::new(time::Duration::ZERO, 1000);
    let certs = held(&gate, 1);
    let who = pod(0);
    let test = async {
        let told = certs.current(&who).await;
        assert!(matches!(told, Err(IdentityError::NotValid(_))), "{told:?}");
        for _ in 0..100 {
            let told = certs.current(&who).await;
            assert!(told.is_err(), "{told:?}");
        }
        assert!(gate.asked()[&who] <= 2, "{:?}", gate.asked());
    };
    beside_rotate(&certs, test).await;
}

const YEARS: Duration = Duration::from_secs(3 * 365 * 86400);

#[tokio::test]
async fn a_certificate_whose_time_has_not_begun_is_issued_anew() {
    let gate = Gate::new(DAY, 100);
    let certs = held(&gate, 1);
    let who = pod(0);
    // The clock is set before anything is issued, since the order of the two tasks is chance.
    AHEAD.set(YEARS);
    let test = async {
        let first = certs.current(&who).await.expect("a certificate");
        AHEAD.set(Duration::ZERO);
        assert!(!first.is_valid(now()), "nobody else takes it");
        let second = certs.current(&who).await.expect("a new one");
        assert!(second.is_valid(now()));
        // The same holds when the clock is set forward.
        AHEAD.set(YEARS);
        let third = certs.current(&who).await.expect("a new one");
        assert!(third.is_valid(now()));
        assert_eq!(gate.asked()[&who], 3);
    };
    beside_rotate(&certs, test).await;
}

#[tokio::test]
async fn a_pause_after_a_failure_is_no_longer_when_the_clock_is_set_back() {
    let gate = Gate::new(DAY, 100);
    let certs = held(&gate, 1);
    let who = pod(0);
    AHEAD.set(YEARS);
    gate.refuses.store(true, Ordering::Relaxed);
    let test = async {
        certs.current(&who).await.expect_err("it is refused");
        gate.refuses.store(false, Ordering::Relaxed);
        AHEAD.set(Duration::ZERO);
        eventually(|| certs.list()[0].certificate.is_some()).await;
        certs.current(&who).await.expect("a certificate");
    };
    let soon = timeout(Duration::from_secs(10), beside_rotate(&certs, test));
    soon.await.expect("soon");
}
