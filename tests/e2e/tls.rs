//! A hub off loopback: its own certificate, pinned from the first command on.

use std::{
    fs,
    io::Read,
    net::{SocketAddr, TcpStream},
};

use connect_tests::{
    PATIENCE,
    home::{Home, Workspace},
    hub::Hub,
    process::{Outcome, Process},
    random_word,
    services::{Service, closed_port},
};

/// A hub that listens on all addresses, and so speaks TLS and wants a token; the token.
fn start() -> (Hub, String) {
    let port = closed_port().port();
    let url = format!("https://127.0.0.1:{port}");
    let hub = Hub::start_on(&format!("0.0.0.0:{port}"), &["--public-url", &url]);
    let created = Process::spawn(
        "connect-hub registration-token",
        Hub::command().args(["registration-token", "create", "--data-dir"]).arg(hub.data_dir()),
    )
    .outcome();
    assert_eq!(created.code, Some(0), "{}", created.stderr);
    (hub, created.stdout.trim().to_owned())
}

fn founded(hub: &Hub, token: &str) -> Workspace {
    let founder = Home::new();
    let founded = founder.json(&["init", "--hub", hub.url(), "--registration-token", token]);
    Workspace { founder, id: founded["workspace_id"].as_str().expect("an id").to_owned() }
}

#[track_caller]
fn check_greeted(address: SocketAddr) {
    let mut client = TcpStream::connect(address).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut hello = [0; 5];
    client.read_exact(&mut hello).expect("the greeting");
    assert_eq!(&hello, b"hello");
}

#[test]
fn pin_travels_from_the_hub_to_the_invite_and_holds() {
    let (mut hub, token) = start();
    let (plain, pin) = hub.url().split_once("#sha256=").expect("the hub printed its pin");
    assert_eq!(pin.len(), 64);

    // Without the pin, with another one, and without TLS.
    let home = Home::new();
    home.fails(&["init", "--hub", plain, "--registration-token", &token], 4, "#sha256=");
    let wrong = format!("{plain}#sha256={}", "0".repeat(64));
    home.fails(&["init", "--hub", &wrong, "--registration-token", &token], 7, "pinned");
    let half = format!("{plain}#sha256={}", &pin[..62]);
    home.fails(&["init", "--hub", &half, "--registration-token", &token], 2, "pin");
    let http = plain.replace("https", "http");
    home.fails(&["init", "--hub", &http, "--registration-token", &token], 4, "");
    assert!(!home.dir().join("membership.json").exists());

    let workspace = founded(&hub, &token);
    let reacher = workspace.join("reacher");
    let (_exposer_agent, _reacher_agent) = (workspace.founder.up(), reacher.up());
    let service = Service::greeting(b"hello");
    let name = format!("svc-{}", random_word());
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", &name]);
    let address = reacher.reach(&name);
    check_greeted(address);

    // The certificate is the same after a restart, so every pin still holds.
    let before = hub.url().to_owned();
    hub.stop();
    hub.restart();
    assert_eq!(hub.url(), before);
    check_greeted(address);
}

#[test]
fn hub_with_another_certificate_is_a_trust_violation() {
    let (mut hub, token) = start();
    let workspace = founded(&hub, &token);
    let code = workspace.founder.ok(&["invite"]);
    hub.stop();
    // Whoever took the hub's address has no key to its certificate.
    for file in ["tls.crt", "tls.key"] {
        fs::remove_file(hub.data_dir().join(file)).expect("it is there");
    }
    hub.restart();
    workspace.founder.fails(&["services"], 7, "pinned");
    let home = Home::new();
    home.fails(&["join", &code], 7, "pinned");
    assert!(!home.dir().join("membership.json").exists());
}

#[test]
fn public_hub_refuses_what_would_open_it_to_everybody() {
    let check = |args: &[&str], part: &str| {
        let dir = connect_tests::process::new_dir("unused");
        let mut command = Hub::command();
        command.args(["serve", "--admin-listen", "127.0.0.1:0", "--data-dir"]).arg(&dir).args(args);
        let Outcome { code, stdout, stderr } =
            Process::spawn("connect-hub", &mut command).outcome();
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    };
    check(&["--listen", "0.0.0.0:0"], "--public-url");
    let public = ["--listen", "0.0.0.0:0", "--public-url", "https://hub.example"];
    check(&[&public[..], &["--registration", "open"]].concat(), "everybody");
    check(&["--listen", "0.0.0.0:0", "--public-url", "http://hub.example"], "https://");
    check(&["--listen", "nonsense"], "--listen");
}
