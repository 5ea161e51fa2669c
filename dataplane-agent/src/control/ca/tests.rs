//! Tests of the CA's files, and of real handshakes with the certificates that it issues.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::proxy::identity::Certs;

const DAY: Duration = Duration::from_secs(86400);

fn identity(text: &str) -> Identity {
    text.parse().expect("an identity")
}

fn alice() -> Identity {
    identity("spiffe://td/ns/a/sa/alice")
}

fn bob() -> Identity {
    identity("spiffe://td/ns/b/sa/bob")
}

fn ca(state: &Path) -> EmbeddedCa {
    EmbeddedCa::open(state, "td", DAY).expect("a CA")
}

fn certs(ca: EmbeddedCa, identities: &[Identity]) -> Certs {
    let certs = Certs::new(Arc::new(ca));
    for identity in identities {
        certs.retain(identity);
    }
    certs
}

/// Returns a certificate, and runs the task that issues it meanwhile.
async fn current(
    certs: &Certs,
    identity: &Identity,
) -> Result<Arc<crate::proxy::identity::WorkloadCertificate>, IdentityError> {
    tokio::select! {
        () = certs.clone().rotate() => unreachable!("it runs until it is dropped"),
        current = certs.current(identity) => current,
    }
}

/// Connects `client` to `server`, and sends a byte each way. Returns the client's error, or else the server's.
async fn shake(client: rustls::ClientConfig, server: rustls::ServerConfig) -> Result<(), String> {
    let (near, far) = tokio::io::duplex(64 << 10);
    let name = rustls_pki_types::ServerName::try_from("0.0.0.0").expect("a name");
    let connect = async {
        let mut tls = TlsConnector::from(Arc::new(client))
            .connect(name, near)
            .await?;
        tls.write_all(b"?").await?;
        let mut answer = [0];
        tls.read_exact(&mut answer).await
    };
    let accept = async {
        let mut tls = TlsAcceptor::from(Arc::new(server)).accept(far).await?;
        let mut asked = [0];
        tls.read_exact(&mut asked).await?;
        tls.write_all(b"!").await?;
        tls.flush().await
    };
    let (connected, accepted) = tokio::join!(connect, accept);
    accepted.map_err(|error| format!("server: {error}"))?;
    connected.map_err(|error| format!("client: {error}"))?;
    Ok(())
}

async fn both(
    client: (&Certs, &Identity, &[Identity]),
    server: (&Certs, &Identity),
) -> Result<(), String> {
    let (certs, who, expected) = client;
    let ours = current(certs, who)
        .await
        .map_err(|error| error.to_string())?;
    let ours = ours.client(expected).map_err(|error| error.to_string())?;
    let theirs = current(server.0, server.1)
        .await
        .map_err(|error| error.to_string())?;
    shake((*ours).clone(), (*theirs.server).clone()).await
}

#[tokio::test]
async fn peers_of_one_mesh_that_expect_each_other_connect() {
    let state = tempfile::tempdir().expect("a folder");
    let (alice, bob) = (alice(), bob());
    let certs = certs(ca(state.path()), &[alice.clone(), bob.clone()]);
    both((&certs, &alice, std::slice::from_ref(&bob)), (&certs, &bob))
        .await
        .expect("a connection");
}

#[tokio::test]
async fn a_server_that_is_somebody_else_is_refused() {
    let state = tempfile::tempdir().expect("a folder");
    let (alice, bob) = (alice(), bob());
    let certs = certs(ca(state.path()), &[alice.clone(), bob.clone()]);
    for expected in [&[][..], std::slice::from_ref(&alice)] {
        let error = both((&certs, &alice, expected), (&certs, &bob)).await;
        assert!(error.is_err(), "{expected:?}");
    }
    let one = (&certs, &alice, std::slice::from_ref(&alice));
    let (near, far) = tokio::io::duplex(64 << 10);
    let config = current(&certs, one.1)
        .await
        .expect("a certificate")
        .client(one.2)
        .expect("settings");
    let server = current(&certs, &bob)
        .await
        .expect("a certificate")
        .server
        .clone();
    let name = rustls_pki_types::ServerName::try_from("0.0.0.0").expect("a name");
    let acceptor = TlsAcceptor::from(server);
    let connector = TlsConnector::from(config);
    let (_, connected) = tokio::join!(acceptor.accept(far), connector.connect(name, near));
    let words = format!("{:?}", connected.expect_err("another peer"));
    assert!(words.contains("peer did not present the expected SAN (spiffe://td/ns/a/sa/alice), got spiffe://td/ns/b/sa/bob"), "{words}");
}

#[tokio::test]
async fn a_client_of_another_trust_domain_is_refused_even_under_the_same_root() {
    let state = tempfile::tempdir().expect("a folder");
    let stranger = identity("spiffe://other/ns/a/sa/alice");
    let other = EmbeddedCa {
        trust_domain: "other".into(),
        ..ca(state.path())
    };
    let strangers = certs(other, std::slice::from_ref(&stranger));
    let certs = certs(ca(state.path()), &[bob()]);
    let error = both((&strangers, &stranger, &[bob()]), (&certs, &bob())).await;
    let error = error.expect_err("another trust domain");
    assert!(error.starts_with("server:"), "{error}");
}

#[tokio::test]
async fn an_identity_of_another_trust_domain_is_not_signed() {
    let state = tempfile::tempdir().expect("a folder");
    let stranger = identity("spiffe://other/ns/a/sa/alice");
    let certs = certs(ca(state.path()), std::slice::from_ref(&stranger));
    let error = current(&certs, &stranger).await.expect_err("not ours");
    assert_eq!(
        error.to_string(),
        "signing error: spiffe://other/ns/a/sa/alice is not of the trust domain of this mesh, td"
    );
}

#[tokio::test]
async fn an_expired_certificate_is_not_used() {
    let state = tempfile::tempdir().expect("a folder");
    let old = EmbeddedCa {
        ttl: Duration::ZERO,
        ..ca(state.path())
    };
    let old = certs(old, &[alice()]);
    assert!(matches!(
        current(&old, &alice()).await,
        Err(IdentityError::NotValid(_))
    ));
}

#[tokio::test]
async fn only_identities_of_this_node_have_certificates() {
    let state = tempfile::tempdir().expect("a folder");
    let certs = certs(ca(state.path()), &[alice()]);
    assert!(matches!(
        current(&certs, &bob()).await,
        Err(IdentityError::Unknown(_))
    ));
    certs.retain(&alice());
    certs.release(&alice());
    assert!(current(&certs, &alice()).await.is_ok());
    certs.release(&alice());
    assert!(matches!(
        current(&certs, &alice()).await,
        Err(IdentityError::Unknown(_))
    ));
}

#[tokio::test]
async fn certificates_are_renewed_before_they_expire() {
    let state = tempfile::tempdir().expect("a folder");
    let short = EmbeddedCa {
        ttl: Duration::from_secs(3),
        ..ca(state.path())
    };
    let certs = certs(short, &[alice()]);
    let first = current(&certs, &alice()).await.expect("a certificate");
    let rotated = async {
        loop {
            let now = current(&certs, &alice()).await.expect("a certificate");
            if now.chain() != first.chain() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = certs.clone().rotate() => {}
        done = tokio::time::timeout(Duration::from_secs(30), rotated) => done.expect("a new one"),
    }
}

#[test]
fn nodes_that_start_together_have_one_root() {
    for _ in 0..20 {
        let state = tempfile::tempdir().expect("a folder");
        let start = std::sync::Barrier::new(8);
        let open = || {
            start.wait();
            ca(state.path()).root
        };
        let roots: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a root"))
                .collect()
        });
        assert!(roots.iter().all(|root| *root == roots[0]));
        let left: Vec<_> = fs::read_dir(state.path())
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        assert_eq!(left, ["ca"], "nothing else is left");
    }
}

fn refused(state: &Path, trust_domain: &str) -> String {
    let opened = EmbeddedCa::open(state, trust_domain, DAY);
    opened.expect_err("not right").to_string()
}

#[test]
fn files_that_are_not_right_are_refused_by_name() {
    let state = tempfile::tempdir().expect("a folder");
    let refused = |trust_domain: &str| refused(state.path(), trust_domain);
    ca(state.path());
    assert!(refused("other").contains("root.pem"));
    let (root, key) = (
        state.path().join("ca/root.pem"),
        state.path().join("ca/key.pem"),
    );
    let mode = |mode| {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).expect("a mode");
    };
    for open in [0o644, 0o640, 0o604, 0o620] {
        mode(open);
        let told = format!("{}: mode {open:o} (chmod 600)", key.display());
        assert!(refused("td").contains(&told), "{}", refused("td"));
    }
    mode(0o600);
    let good = fs::read(&key).expect("a key");
    fs::write(&key, KeyPair::generate().expect("a key").serialize_pem()).expect("a file");
    assert!(refused("td").contains("is not the key of"));
    fs::write(&key, "half").expect("a file");
    assert!(refused("td").contains("key.pem"));
    fs::write(&key, good).expect("a file");
    fs::write(&root, "half").expect("a file");
    assert!(refused("td").contains("root.pem"));
}

/// Returns all paths below a folder, with the content of files.
fn all_of(folder: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut all: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .flat_map(|path| match path.is_dir() {
            true => all_of(&path),
            false => vec![(path.clone(), fs::read(path).ok())],
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_ca_of_which_a_part_is_lost_is_refused_and_nothing_is_overwritten() {
    use std::os::unix::fs::symlink;
    let (root, key, other) = ("ca/root.pem", "ca/key.pem", "ca/notes");
    let lose = |file: &'static str| move |state: &Path| fs::remove_file(state.join(file));
    type Lose = Box<dyn Fn(&Path) -> io::Result<()>>;
    let ways: [(Lose, &str); 6] = [
        (Box::new(lose(root)), "root.pem is missing"),
        (Box::new(lose(key)), "key.pem is missing"),
        (
            Box::new(move |state| {
                fs::write(state.join(other), "keep me")?;
                lose(root)(state)?;
                lose(key)(state)
            }),
            "ca/notes is there",
        ),
        (
            Box::new(move |state| {
                lose(root)(state)?;
                symlink("/nowhere/root.pem", state.join(root))
            }),
            "root.pem is missing",
        ),
        (
            Box::new(move |state| {
                lose(root)(state)?;
                lose(key)(state)?;
                symlink("/nowhere/root.pem", state.join(root))
            }),
            "root.pem",
        ),
        (
            Box::new(move |state| {
                lose(root)(state)?;
                fs::create_dir(state.join(root))
            }),
            "root.pem: ",
        ),
    ];
    for (lose, word) in ways {
        let state = tempfile::tempdir().expect("a folder");
        ca(state.path());
        lose(state.path()).expect("it can be lost");
        let before = all_of(state.path());
        let told = refused(state.path(), "td");
        assert!(told.contains(word), "{word}: {told}");
        assert_eq!(all_of(state.path()), before, "{word}");
    }
}

#[test]
fn an_empty_folder_gets_a_new_ca() {
    let state = tempfile::tempdir().expect("a folder");
    fs::create_dir(state.path().join("ca")).expect("a folder");
    let made = ca(state.path());
    assert_eq!(ca(state.path()).root, made.root);
    let key = fs::metadata(state.path().join("ca/key.pem")).expect("a key");
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
}

/// Replaces the CA's root by one with the same key and this life.
fn with_life(state: &Path, from: time::Duration, until: time::Duration) {
    ca(state);
    let key = fs::read_to_string(state.join("ca/key.pem")).expect("a key");
    let key = KeyPair::from_pem(&key).expect("a key");
    let mut root = CertificateParams::default();
    root.not_before = OffsetDateTime::now_utc() + from;
    root.not_after = OffsetDateTime::now_utc() + until;
    root.distinguished_name = rcgen::DistinguishedName::new();
    root.distinguished_name.push(DnType::OrganizationName, "td");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = root.self_signed(&key).expect("a root").pem();
    fs::write(state.join("ca/root.pem"), root).expect("a file");
}

#[test]
fn a_root_that_is_not_valid_now_is_refused() {
    let day = time::Duration::DAY;
    for (from, until) in [(-2 * day, -day), (day, 2 * day)] {
        let state = tempfile::tempdir().expect("a folder");
        with_life(state.path(), from, until);
        let told = refused(state.path(), "td");
        assert!(told.contains("root.pem: is valid from"), "{told}");
    }
}

#[test]
fn a_certificate_lives_no_longer_than_the_root_and_a_life_too_short_is_refused() {
    let state = tempfile::tempdir().expect("a folder");
    with_life(state.path(), -time::Duration::DAY, time::Duration::HOUR);
    let issued = ca(state.path()).sign(&alice()).expect("a certificate");
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).expect("a leaf");
    let (_, root) = X509Certificate::from_der(&issued.roots[0]).expect("a root");
    assert_eq!(leaf.validity().not_after, root.validity().not_after);
    for ttl in [Duration::from_millis(1), Duration::from_secs(9)] {
        let error = EmbeddedCa::open(state.path(), "td", ttl).expect_err("too short");
        assert!(error.to_string().starts_with("--secret-ttl: "), "{error}");
    }
}

#[test]
fn a_root_that_ends_is_told_as_long_as_the_agent_runs() {
    let state = tempfile::tempdir().expect("a folder");
    let made = ca(state.path());
    let end = made.root_end();
    let told = |before: time::Duration| end.problem_at(end.at - before);
    assert_eq!(end.problem(), None);
    assert_eq!(told(EXPIRY_WARNING), None);
    let soon = told(EXPIRY_WARNING - time::Duration::SECOND).expect("it ends soon");
    assert!(
        soon.contains("root.pem: the root certificate ends at 20"),
        "{soon}"
    );
    let ended = told(time::Duration::ZERO).expect("it has ended");
    assert!(ended.contains("has ended"), "{ended}");
    // In the last 60 days certificates live shorter than they should.
    let long = EmbeddedCa::open(state.path(), "td", 60 * DAY).expect("a CA");
    let end = long.root_end();
    assert!(end.problem_at(end.at - time::Duration::days(59)).is_some());
    assert_eq!(end.problem_at(end.at - time::Duration::days(60)), None);
}

#[test]
fn a_key_is_roots_or_the_users_own() {
    assert_eq!(exposed(0, 0o100_600, 7).or(exposed(7, 0o100_400, 7)), None);
    let told = exposed(8, 0o100_600, 7);
    assert_eq!(told.as_deref(), Some("belongs to user 8 (chown root)"));
    if geteuid().is_root() {
        let state = tempfile::tempdir().expect("a folder");
        ca(state.path());
        std::os::unix::fs::chown(key_of(state.path()), Some(8), None).expect("root may");
        let error = EmbeddedCa::open(state.path(), "td", DAY).expect_err("another's");
        let told = "ca/key.pem: belongs to user 8 (chown root)";
        assert!(error.to_string().contains(told), "{error}");
    }
}

#[test]
fn what_an_interrupted_start_left_goes_with_the_next_one_and_nothing_else_does() {
    let state = tempfile::tempdir().expect("a folder");
    let made = |name: &str, seconds: u64| {
        let folder = state.path().join(name);
        fs::create_dir(&folder).expect("a folder");
        fs::write(folder.join("key.pem"), "").expect("a file");
        let at = std::time::SystemTime::now() - Duration::from_secs(seconds);
        let folder = File::open(&folder).expect("a folder");
        folder.set_modified(at).expect("a time");
    };
    made(".ca-0123456789abcdef", 3600);
    made(".ca-fedcba9876543210", 1); // Another node starts just now.
    made(".ca-backup", 3600);
    let theirs = state.path().join(".ca-1111111111111111");
    made(".ca-1111111111111111", 3600);
    fs::write(theirs.join("precious"), "").expect("a file");
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    let folder = File::open(&theirs).expect("a folder");
    folder.set_modified(old).expect("a time");
    for _ in 0..2 {
        ca(state.path());
        let there = |name: &str| state.path().join(name).exists();
        assert!(!there(".ca-0123456789abcdef"));
        assert!(there(".ca-fedcba9876543210/key.pem") && there(".ca-backup/key.pem"));
        assert!(there(".ca-1111111111111111/precious"));
    }
}
