//! Bad input to the command line: a clear message, the documented exit code, nothing lost.

use std::{
    io::Read,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Home, Workspace},
    hub::Hub,
    process::{Outcome, Process, new_dir},
    random_word, runtime,
    services::{Service, closed_port},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A home that no command may have enrolled.
#[track_caller]
fn check_not_enrolled(home: &Home) {
    assert!(!home.dir().join("membership.json").exists());
    assert!(!home.dir().join("agent.key").exists());
}

#[track_caller]
fn check_init(url: &str, code: i32, part: &str) {
    let home = Home::new();
    home.fails(&["init", "--hub", url], code, part);
    check_not_enrolled(&home);
}

#[test]
fn invite_with_one_changed_character_is_damaged() {
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite"]);
    for at in [3, 4, code.len() / 2, code.len() - 1] {
        let mut changed = code.clone().into_bytes();
        changed[at] = if changed[at] == b'q' { b'p' } else { b'q' };
        let changed = String::from_utf8(changed).expect("ASCII");
        let home = Home::new();
        home.fails(&["join", &changed], 2, "damaged");
        check_not_enrolled(&home);
    }
    let home = Home::new();
    home.fails(&["join", &code[..code.len() - 1]], 2, "damaged");
    home.fails(&["join", "pc1"], 2, "invite");
    home.fails(&["join", "hello"], 2, "not an invite");
    home.fails(&["join", &"pc1q".repeat(300)], 2, "too long");
    // None of that used it up.
    home.ok(&["join", &code]);
}

#[test]
fn invite_is_good_once() {
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite"]);
    Home::new().ok(&["join", &code]);
    let late = Home::new();
    late.fails(&["join", &code], 6, "hint: ask for a new code");
    check_not_enrolled(&late);

    let twice = workspace.founder.ok(&["invite", "--uses", "2"]);
    Home::new().ok(&["join", &twice]);
    Home::new().ok(&["join", &twice]);
    late.fails(&["join", &twice], 6, "");
}

#[test]
fn expired_invite_is_refused() {
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite", "--expires", "1s"]);
    let made = Instant::now();
    // Times have whole seconds, so two and a bit are surely over.
    eventually("the invite has expired", || made.elapsed() > Duration::from_millis(2100));
    let home = Home::new();
    home.fails(&["join", &code], 6, "expired");
    check_not_enrolled(&home);
}

#[test]
fn join_takes_the_code_from_stdin_and_environment() {
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite", "--uses", "2"]);
    let mut process = Process::spawn("connect join -", &mut Home::new().command(&["join", "-"]));
    process.feed(format!("{code}\n").as_bytes());
    let Outcome { code: exit, stderr, .. } = process.outcome();
    assert_eq!(exit, Some(0), "{stderr}");
    let home = Home::new();
    let mut command = home.command(&["join"]);
    let outcome = Process::spawn("connect join", command.env("CONNECT_INVITE", &code)).outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

#[test]
fn enrolled_home_is_left_as_it_is() {
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite"]);
    let before = workspace.founder.snapshot();
    workspace.founder.fails(&["init", "--hub", Hub::shared().url()], 2, "nothing was changed");
    workspace.founder.fails(&["join", &code], 2, "nothing was changed");
    assert!(workspace.founder.snapshot() == before);
    // Also while its agent runs.
    let _agent = workspace.founder.up();
    workspace.founder.fails(&["join", &code], 2, "nothing was changed");
    Home::new().ok(&["join", &code]);
}

#[test]
fn member_without_a_signer_key_cannot_invite() {
    let workspace = Workspace::found(Hub::shared());
    workspace.join("member").fails(&["invite"], 6, "connect init");
}

#[test]
fn service_names_are_dns_labels_and_no_commands() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let _agent = home.up();
    let service = Service::echo();
    let target = service.address().to_string();
    let expose = |name: &str, part: &str| {
        home.fails(&["expose", &target, "--name", name], 2, part);
    };
    expose("has space", "' '");
    expose(&"n".repeat(300), "63");
    expose("under_score", "'_'");
    expose("-", "hyphen");
    expose("", "empty");
    for command in ["status", "expose", "help", "UP"] {
        expose(command, "command");
    }
    assert_eq!(home.ok(&["expose", &target, "--name", "Upper-Case"]), "upper-case");
    assert_eq!(home.json(&["services"])[0]["name"], "upper-case");
    home.reach("UPPER-case");
}

#[test]
fn bad_targets_are_refused() {
    let home = Workspace::found(Hub::shared()).founder;
    for target in ["localhost", "localhost:0", "localhost:65536", "http://localhost:80", ""] {
        home.fails(&["expose", target, "--name", "x"], 2, "target");
    }
}

#[test]
fn port_in_use_is_refused_and_nothing_is_kept() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let _agent = home.up();
    let service = Service::echo();
    home.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("it is bound").port().to_string();
    home.fails(&["reach", "svc", "--port", &port], 2, &port);
    assert_eq!(home.json(&["status"])["reached"].as_array().map(Vec::len), Some(0));
    drop(taken);
    assert!(home.ok(&["reach", "svc", "--port", &port]).ends_with(&port));
}

#[test]
fn home_that_cannot_be_written_is_named() {
    let dir = new_dir("unwritable");
    let file = dir.join("file");
    std::fs::write(&file, "").expect("our own directory");
    let url = Hub::shared().url();
    let under_a_file = Home::at(file.join("home"));
    under_a_file.fails(&["init", "--hub", url], 1, "cannot write");
    if !nix::unistd::geteuid().is_root() {
        // Nothing stops root.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o500)).expect("ours");
        Home::at(dir.join("home")).fails(&["init", "--hub", url], 1, "cannot write");
    }
}

#[test]
fn very_long_home_works_end_to_end() {
    let long = new_dir("long").join("d".repeat(120)).join("e".repeat(120));
    assert!(long.as_os_str().len() > 200);
    let home = Home::at(&long);
    home.ok(&["init", "--hub", Hub::shared().url()]);
    let agent = home.up();
    let service = Service::greeting(b"hello");
    home.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    let mut client =
        std::net::TcpStream::connect(home.reach("svc")).expect("the local port is bound");
    let mut hello = [0; 5];
    client.read_exact(&mut hello).expect("the greeting");
    assert_eq!(home.json(&["status"])["connected"], true);
    home.ok(&["down"]);
    assert_eq!(agent.outcome().code, Some(0));
    home.fails(&["status"], 9, "no agent");
}

#[test]
fn hub_that_is_not_there_is_unreachable() {
    let address = closed_port();
    check_init(&format!("http://{address}"), 4, &address.to_string());
    check_init("http://localhost:1", 4, "localhost:1");
    check_init("https://does-not-exist.invalid", 4, "does-not-exist.invalid");
}

#[test]
fn what_speaks_something_else_is_no_hub() {
    let web = Service::start(|mut tcp| async move {
        let mut request = [0; 4096];
        if tcp.read(&mut request).await.is_ok() {
            let page = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = tcp.write_all(page).await;
        }
    });
    check_init(&format!("http://{}", web.address()), 4, "404");
    check_init(&format!("https://{}", web.address()), 4, "TLS");
    let echo = Service::echo();
    check_init(&format!("http://{}", echo.address()), 4, "");
    check_init(&format!("https://{}", echo.address()), 4, "TLS");
    let closing = Service::start(|tcp| async move { drop(tcp) });
    check_init(&format!("http://{}", closing.address()), 4, "");
    check_init(&format!("https://{}", Hub::shared().address()), 4, "TLS");
    let ssh = Service::greeting(b"SSH-2.0-OpenSSH_9.2\r\n");
    check_init(&format!("http://{}", ssh.address()), 4, "");
}

#[test]
fn websocket_that_is_no_hub_is_unreachable() {
    let talk = |first: &'static str| {
        Service::start(move |tcp| async move {
            if let Ok(mut socket) = tokio_tungstenite::accept_async(tcp).await {
                use futures_util::{SinkExt, StreamExt};
                let _ = socket.send(first.into()).await;
                while let Some(Ok(_)) = socket.next().await {}
            }
        })
    };
    let nonce = "00".repeat(32);
    let newer: &str =
        Box::leak(format!(r#"{{"type":"challenge","version":9,"nonce":"{nonce}"}}"#).into());
    for (first, part) in [
        ("hello", "does not speak this protocol"),
        ("{}", "does not speak this protocol"),
        (r#"{"type":"welcome"}"#, "does not speak this protocol"),
        (newer, "version 9"),
    ] {
        let service = talk(first);
        check_init(&format!("http://{}", service.address()), 4, part);
    }
}

#[test]
fn hub_that_never_answers_is_given_up() {
    let silent = Service::start(|mut tcp| async move {
        let mut request = Vec::new();
        let _ = tcp.read_to_end(&mut request).await;
    });
    check_init(&format!("http://{}", silent.address()), 4, "no answer in 10 s");
}

#[test]
fn plain_text_goes_to_this_machine_only() {
    for url in ["http://192.0.2.1:7420", "ws://hub.example.com", "http://localhost.example.com"] {
        check_init(url, 2, "plain text");
    }
    for url in ["127.0.0.1:7420", "ftp://127.0.0.1", "http://", "http://127.0.0.1/path", ""] {
        check_init(url, 2, "");
    }
}

#[test]
fn commands_need_a_member_and_an_agent() {
    let home = Home::new();
    for command in [&["up"][..], &["down"], &["status"], &["services"], &["agents"], &["invite"]] {
        home.fails(command, 3, "connect init");
    }
    home.fails(&["expose", "127.0.0.1:1", "--name", "x"], 3, "connect init");
    home.fails(&["reach", "x"], 3, "connect init");
    assert!(!home.dir().exists(), "asking leaves nothing behind");

    let member = Workspace::found(Hub::shared()).founder;
    for command in [&["down"][..], &["status"], &["unexpose", "x"], &["unreach", "x"]] {
        member.fails(command, 9, "connect up");
    }
    member.fails(&["reach", "nothing-of-this-name"], 5, "nothing-of-this-name");
    let _agent = member.up();
    member.fails(&["reach", "nothing-of-this-name"], 5, "nothing-of-this-name");
    member.fails(&["unreach", "nothing-of-this-name"], 5, "nothing-of-this-name");
    member.fails(&["unexpose", "nothing-of-this-name"], 5, "nothing-of-this-name");
}

#[test]
fn taken_name_is_refused_and_its_holder_named() {
    let workspace = Workspace::found(Hub::shared());
    let other = workspace.join("other");
    let (_one, _two) = (workspace.founder.up(), other.up());
    let service = Service::echo();
    let target = service.address().to_string();
    workspace.founder.ok(&["expose", &target, "--name", "svc"]);
    let holder = workspace.founder.json(&["status"])["agent_id"].as_str().expect("id").to_owned();
    other.fails(&["expose", &target, "--name", "svc"], 6, &holder[..8]);
    // The same agent may expose it again, from elsewhere.
    let elsewhere = Service::echo();
    workspace.founder.ok(&["expose", &elsewhere.address().to_string(), "--name", "svc"]);
    workspace.founder.ok(&["unexpose", "svc"]);
    other.ok(&["expose", &target, "--name", "svc"]);
}

#[test]
fn offline_exposer_is_told_and_waited_for() {
    let workspace = Workspace::found(Hub::shared());
    let reacher = workspace.join("reacher");
    let agent = workspace.founder.up();
    let service = Service::greeting(b"back");
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    workspace.founder.ok(&["down"]);
    assert_eq!(agent.outcome().code, Some(0));
    let _reacher_agent = reacher.up();
    reacher.fails(&["reach", "svc"], 10, "offline");
    // It bound the port and goes on trying.
    let reached = &reacher.json(&["status"])["reached"][0];
    let address: SocketAddr = reached["address"].as_str().expect("text").parse().expect("address");
    assert_eq!(reached["active"], false);
    let _agent = workspace.founder.up();
    let mut client = std::net::TcpStream::connect(address).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut back = [0; 4];
    client.read_exact(&mut back).expect("the client waited for the tunnel");
    assert_eq!(&back, b"back");
}

#[test]
fn allow_list_holds_by_tag_and_by_agent() {
    let workspace = Workspace::found(Hub::shared());
    let _agent = workspace.founder.up();
    let service = Service::greeting(b"welcome");
    let code = workspace.founder.ok(&["invite", "--tag", "dba"]);
    let (tagged, plain, named) = (Home::new(), workspace.join("plain"), workspace.join("named"));
    tagged.ok(&["join", &code]);
    let agents = workspace.founder.json(&["agents"]);
    let named_id = agents
        .as_array()
        .expect("a list")
        .iter()
        .find(|agent| agent["label"] == "named")
        .and_then(|agent| agent["agent_id"].as_str())
        .expect("it is listed");
    let target = service.address().to_string();
    workspace
        .founder
        .ok(&["expose", &target, "--name", "svc", "--allow", "dba", "--allow", named_id]);
    let dialled = service.probed();
    plain.fails(&["reach", "svc"], 6, "allow");
    assert_eq!(service.accepted(), dialled);
    for home in [&tagged, &named] {
        let _agent = home.up();
        let mut client = std::net::TcpStream::connect(home.reach("svc")).expect("it is bound");
        client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        let mut welcome = [0; 7];
        client.read_exact(&mut welcome).expect("it is allowed");
    }
}

#[test]
fn json_errors_are_objects_with_code_and_hint() {
    let Outcome { code, stdout, stderr } = Home::new().run(&["--json", "services"]);
    assert_eq!((code, stdout.as_str()), (Some(3), ""));
    let error: serde_json::Value = serde_json::from_str(&stderr).expect("JSON alone");
    assert_eq!(error["code"], "not_enrolled");
    assert!(error["error"].is_string() && error["hint"].is_string());
}

#[test]
fn label_cannot_fool_a_terminal() {
    let home = Home::new();
    let url = Hub::shared().url();
    home.fails(&["init", "--hub", url, "--label", "a\x1b[2Jb"], 2, "control");
    home.fails(&["init", "--hub", url, "--label", &"l".repeat(65)], 2, "64");
    check_not_enrolled(&home);
    home.ok(&["init", "--hub", url, "--label", &format!("ü {}", random_word())]);
}

#[test]
fn registration_needs_a_token_where_it_is_not_open() {
    let hub = Hub::start(&["--registration", "token"]);
    check_init(hub.url(), 6, "token");
    let token = Process::spawn(
        "connect-hub registration-token",
        Hub::command().args(["registration-token", "create", "--data-dir"]).arg(hub.data_dir()),
    )
    .outcome();
    assert_eq!(token.code, Some(0), "{}", token.stderr);
    let token = token.stdout.trim();
    check_wrong_token(&hub, token);
    let home = Home::new();
    home.ok(&["init", "--hub", hub.url(), "--registration-token", token]);
    let again = Home::new();
    again.fails(&["init", "--hub", hub.url(), "--registration-token", token], 6, "token");
    assert!(!hub.log().contains(token), "the log holds a secret");
}

fn check_wrong_token(hub: &Hub, token: &str) {
    let wrong: String = token.chars().rev().collect();
    let home = Home::new();
    home.fails(&["init", "--hub", hub.url(), "--registration-token", &wrong], 6, "token");
    check_not_enrolled(&home);
}

#[test]
fn closed_stdout_is_no_reason_to_fail_or_hang() {
    // A reader that goes away, as `connect … | head -1` does.
    let home = Workspace::found(Hub::shared()).founder;
    let outcome = runtime().block_on(async {
        let mut child = tokio::process::Command::from(home.command(&["agents"]))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("it starts");
        drop(child.stdout.take());
        child.wait_with_output().await.expect("it ends")
    });
    let stderr = String::from_utf8_lossy(&outcome.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
}
