//! What an operator does with the program: start, stop, kill, migrate, mistype.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use connect_spec::{
    control::{ErrorCode, FromHub, RegistrationToken, Reply, Request},
    encoding::Encoding,
};
use futures_util::{SinkExt as _, StreamExt as _};
use nix::{
    pty::openpty,
    sys::signal::Signal,
    unistd::{Uid, User, chown},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::{Control, Dialer, Workspace, error_code},
    process::{HubProcess, run, stderr},
    template::{empty_place, place},
    tunnels::{Data, SERVICE, TAG, World, open},
};

/// The status of an answer of the admin listener.
pub(crate) async fn status(admin: SocketAddr, path: &str) -> u16 {
    get(admin, path).await.split(' ').nth(1).unwrap().parse().unwrap()
}

async fn get(admin: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(admin).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: hub\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn postmaster(data_dir: &Path) -> i32 {
    let text = fs::read_to_string(data_dir.join("postgres/postmaster.pid")).unwrap();
    text.lines().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_killed_hub_leaves_its_database_to_the_next() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let agent = workspace.founder();
    let control = Control::log_in(hub.agents, &workspace, &agent).await;
    let database = postmaster(&data_dir);

    // Two hubs on one directory: the second is told who has it.
    let dir = data_dir.to_str().unwrap();
    let second = run(&[
        "serve",
        "--data-dir",
        dir,
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        "127.0.0.1:0",
    ])
    .await;
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another connect-hub"), "{}", stderr(&second));
    assert!(stderr(&second).contains("hint: "));

    hub.signal(Signal::SIGKILL);
    let (status, _) = hub.wait().await;
    assert!(!status.success());
    drop(control);
    let hub = HubProcess::start(&data_dir).await;
    assert_eq!(postmaster(&data_dir), database, "the database was restarted");
    let mut control = Control::connect(hub.agents).await;
    assert!(matches!(control.try_log_in(&agent, |_| ()).await, FromHub::Welcome { .. }));

    // Both killed: recovered.
    hub.signal(Signal::SIGKILL);
    let killed = nix::sys::signal::kill(nix::unistd::Pid::from_raw(database), Signal::SIGKILL);
    assert_eq!(killed, Ok(()));
    hub.wait().await;
    let hub = HubProcess::start(&data_dir).await;
    let mut control = Control::connect(hub.agents).await;
    assert!(matches!(control.try_log_in(&agent, |_| ()).await, FromHub::Welcome { .. }));
    hub.stop().await;
    assert!(!data_dir.join("postgres/postmaster.pid").exists(), "the database still runs");
}

#[tokio::test]
async fn a_database_that_dies_is_brought_back() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    assert!(status(hub.admin, "/healthz").await == 200);
    assert!(status(hub.admin, "/readyz").await == 200);
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let database = postmaster(&data_dir);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(database), Signal::SIGKILL).unwrap();
    // Either the hub says that it is away, or it is back already; then all is as before.
    while status(hub.admin, "/readyz").await != 200 || postmaster(&data_dir) == database {
        assert!(status(hub.admin, "/healthz").await == 200);
    }
    control
        .done(connect_spec::control::Request::PublishAgent { record: crate::client::record(1) })
        .await;
    hub.stop().await;
}

#[tokio::test]
async fn a_hub_that_drains_says_so_and_serves_until_it_is_told_again() {
    let (_dir, data_dir) = place().await;
    let args = ["--listen", "127.0.0.1:0", "--drain", "1h"];
    let hub = HubProcess::start_with(&data_dir, &args, |_| ()).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    hub.signal(Signal::SIGTERM);
    while !get(hub.admin, "/readyz").await.ends_with("draining\n") {}
    assert!(get(hub.admin, "/healthz").await.starts_with("HTTP/1.1 200"));
    // Whoever is here stays, and newcomers are taken.
    control
        .done(connect_spec::control::Request::PublishAgent { record: crate::client::record(1) })
        .await;
    drop(Control::log_in(hub.agents, &workspace, &workspace.founder()).await);
    hub.stop().await;
    assert!(!data_dir.join("postgres/postmaster.pid").exists(), "the database still runs");
}

#[tokio::test]
async fn health_checks_are_answered_until_the_last_agent_is_gone() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    // It reads nothing, so it is not gone before the hub's patience is over.
    let control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    hub.signal(Signal::SIGTERM);
    while !get(hub.admin, "/readyz").await.ends_with("draining\n") {}
    let (status, log) = hub.wait().await;
    assert!(status.success(), "{log}");
    drop(control);
}

#[tokio::test]
async fn a_hangup_ends_a_hub_on_a_terminal_and_no_other() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    hub.signal(Signal::SIGHUP);
    hub.logged("no certificate of yours").await;
    assert!(get(hub.admin, "/healthz").await.starts_with("HTTP/1.1 200"));
    hub.stop().await;

    let terminal = openpty(None, None).unwrap();
    let listen = ["--listen", "127.0.0.1:0"];
    let hub = HubProcess::start_with(&data_dir, &listen, |command| {
        command.stdin(terminal.slave);
    })
    .await;
    hub.signal(Signal::SIGHUP);
    let (status, log) = hub.wait().await;
    assert!(status.success(), "{log}");
    assert!(!data_dir.join("postgres/postmaster.pid").exists(), "the database still runs");
}

#[tokio::test]
async fn while_the_database_is_away_open_tunnels_go_on_and_nothing_begins() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (mut reacher, mut exposer) = world.tunnel(Encoding::Base64).await;
    let pass = async |reacher: &mut Data, exposer: &mut Data, text: &'static str| {
        reacher.send(Message::text(text)).await.unwrap();
        assert_eq!(exposer.next().await.unwrap().unwrap(), Message::text(text));
    };
    pass(&mut reacher, &mut exposer, "AAAA").await;

    // Where the supervisor looks for it there is no database until we put it back.
    let (pgdata, hidden) = (data_dir.join("postgres"), data_dir.join("hidden"));
    let database = postmaster(&data_dir);
    fs::rename(&pgdata, &hidden).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(database), Signal::SIGKILL).unwrap();
    while status(world.hub.admin, "/readyz").await == 200 {}
    assert!(status(world.hub.admin, "/readyz").await == 503);
    assert!(status(world.hub.admin, "/healthz").await == 200);

    pass(&mut reacher, &mut exposer, "BBBB").await;
    // A new tunnel, a request and a login are refused at once, with a reason and a time.
    let refused = |reply: Reply| match reply {
        Reply::Error(report) => {
            assert_eq!(report.code, ErrorCode::Busy);
            assert!(report.message.contains("database"), "{}", report.message);
            assert!(report.retry_in_ms.is_some());
        }
        other => panic!("{other:?}"),
    };
    let began = std::time::Instant::now();
    let tunnel = open(99, SERVICE, world.exposer.id);
    refused(world.reaching.request(Request::OpenTunnel(tunnel.clone())).await);
    refused(world.reaching.request(Request::Lookup { tag: TAG }).await);
    let mut late = Control::connect(world.hub.agents).await;
    match late.try_log_in(&world.exposer, |_| ()).await {
        FromHub::Error(report) => refused(Reply::Error(report)),
        other => panic!("{other:?}"),
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(4), "somebody waited for a database");
    pass(&mut reacher, &mut exposer, "CCCC").await;

    fs::rename(&hidden, &pgdata).unwrap();
    while status(world.hub.admin, "/readyz").await != 200 {}
    pass(&mut reacher, &mut exposer, "DDDD").await;
    world.tickets(Encoding::Base64).await;
    assert!(matches!(
        world.reaching.request(Request::Lookup { tag: TAG }).await,
        Reply::Services { .. }
    ));
    let log = world.hub.stop().await;
    assert!(log.contains("the database is away") && log.contains("the database is back"), "{log}");
}

#[tokio::test]
async fn off_loopback_there_is_tls_with_a_pin_and_no_open_door() {
    let (_dir, data_dir) = place().await;
    let args = ["--listen", "0.0.0.0:0", "--public-url", "https://hub.example:7420"];
    let hub = HubProcess::start_with(&data_dir, &args, |_| ()).await;
    let pem = fs::read(data_dir.join("tls.crt")).unwrap();
    let certificate = CertificateDer::from_pem_slice(&pem).unwrap();
    let pin = hex::encode(Sha256::digest(&certificate));
    assert_eq!(
        hub.init_line,
        format!(
            "connect init --hub https://hub.example:7420#sha256={pin} --registration-token TOKEN"
        )
    );

    let local = SocketAddr::from(([127, 0, 0, 1], hub.agents.port()));
    let dialer = Dialer::pinned(local, "hub.example:7420", certificate);
    let workspace = Workspace::new();
    let founder = workspace.founder();
    let create = workspace.create(None);
    let refusal =
        dialer.control().await.try_log_in(&founder, |login| login.create = Some(create)).await;
    assert_eq!(error_code(refusal), ErrorCode::RegistrationClosed);

    // Made beside the running hub, spent once.
    let output =
        run(&["registration-token", "create", "--data-dir", data_dir.to_str().unwrap()]).await;
    assert!(output.status.success(), "{}", stderr(&output));
    let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    assert_eq!(token.len(), 64);
    let create = workspace.create(Some(&token));
    let welcome =
        dialer.control().await.try_log_in(&founder, |login| login.create = Some(create)).await;
    assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
    let other = Workspace::new();
    let create = other.create(Some(&token));
    let refusal = dialer
        .control()
        .await
        .try_log_in(&other.founder(), |login| login.create = Some(create))
        .await;
    assert_eq!(error_code(refusal), ErrorCode::RegistrationClosed);
    assert_eq!(format!("{:?}", RegistrationToken(token.clone())), "RegistrationToken(..)");

    // Off loopback its names are those that were configured.
    let mut local = dialer.control().await;
    local.authority = "localhost:7420".to_owned();
    assert_eq!(error_code(local.try_log_in(&founder, |_| ()).await), ErrorCode::WrongAuthority);
    assert!(!hub.stop().await.contains(&token));
}

#[tokio::test]
async fn an_ordinary_user_runs_it_with_a_long_path() {
    let (dir, _) = empty_place();
    let mut data_dir = dir.path().to_owned();
    let user = User::from_name("nobody").unwrap().unwrap();
    for _ in 0..4 {
        data_dir.push("a".repeat(30));
    }
    fs::create_dir_all(&data_dir).unwrap();
    let switch = Uid::effective().is_root();
    if switch {
        chown(&data_dir, Some(user.uid), Some(user.gid)).unwrap();
    }
    let prepare = |command: &mut tokio::process::Command| {
        if switch {
            command
                .uid(user.uid.as_raw())
                .gid(user.gid.as_raw())
                .current_dir("/")
                .env("HOME", "/nonexistent");
        }
    };
    let hub = HubProcess::start_with(&data_dir, &["--listen", "127.0.0.1:0"], prepare).await;
    let workspace = Workspace::new();
    drop(Control::log_in(hub.agents, &workspace, &workspace.founder()).await);
    assert_eq!(fs::metadata(data_dir.join("postgres")).unwrap().mode() & 0o777, 0o700);
    hub.stop().await;
}

#[tokio::test]
async fn a_directory_in_the_way_is_named() {
    if !Uid::effective().is_root() {
        // An ordinary user's database runs as that user: nothing can be in its way.
        return;
    }
    let (dir, data_dir) = empty_place();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let args = ["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data-dir"];
    let output = run(&[&args[..], &[data_dir.to_str().unwrap()]].concat()).await;
    assert_eq!(output.status.code(), Some(2));
    let (path, text) = (dir.path().display().to_string(), stderr(&output));
    assert!(text.contains(&format!("cannot enter `{path}`")), "{text}");
    assert!(text.contains(&format!("hint: `chmod o+x {path}`")), "{text}");
}

#[tokio::test]
async fn mistakes_have_their_codes_and_hints() {
    let (_dir, data_dir) = empty_place();
    let dir = data_dir.to_str().unwrap();
    let taken = TakenAddress::bind();
    for (args, code, says) in [
        (vec!["serve", "--listen", "0.0.0.0:0", "--data-dir", dir], 2, "--public-url"),
        (vec!["serve", "--listen", "nowhere", "--data-dir", dir], 2, "--listen"),
        (vec!["fly"], 2, "fly"),
        (vec!["serve", "--listen", &taken.address, "--data-dir", dir], 1, "cannot listen on"),
        (vec!["--log", "=,=", "migrate", "--data-dir", dir], 2, "log filter"),
        (
            vec![
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
                "--data-dir",
                "/proc/nowhere",
            ],
            1,
            "/proc/nowhere",
        ),
        (
            vec![
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
                "--database-url",
                "postgres://u:hunter2@127.0.0.1:1/x",
            ],
            1,
            "database",
        ),
    ] {
        let output = run(&args).await;
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(says), "{args:?}: {text}");
        assert!(text.contains("error: "), "{args:?}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

/// An address that is in use.
struct TakenAddress {
    address: String,
    _listener: std::net::TcpListener,
}

impl TakenAddress {
    fn bind() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self { address: listener.local_addr().unwrap().to_string(), _listener: listener }
    }
}
