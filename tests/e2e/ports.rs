//! Local ports of reached services: which one, that it stays, and what is said when it cannot be had.

use std::{
    fs,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    thread,
};

use connect_tests::{
    PATIENCE,
    home::{Home, Pair, Workspace},
    hub::Hub,
    process::{Process, program},
    random_word,
    services::Service,
};
use serde_json::Value;

fn name() -> String {
    format!("svc-{}", random_word())
}

/// A port that is free at this address.
fn free_port(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

#[track_caller]
fn check_greeted(address: SocketAddr, banner: &[u8]) {
    let mut client = TcpStream::connect(address).expect("it is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut read = vec![0; banner.len()];
    client.read_exact(&mut read).expect("the service greets");
    assert_eq!(read, banner);
}

#[test]
fn services_of_one_port_have_it_at_an_address_each() {
    let pair = Pair::start(Hub::shared());
    // Both are on one port, at addresses of their own.
    let port = free_port("127.0.0.31");
    let banners: [&'static [u8]; 2] = [b"one..", b"two.."];
    let services: Vec<_> = (1..)
        .zip(banners)
        .map(|(number, banner)| {
            let at = format!("127.0.1.{number}:{port}").parse().expect("an address");
            let service = Service::start_on(at, move |mut tcp| async move {
                use tokio::io::AsyncWriteExt;
                // A probe may be gone by now.
                let _ = tcp.write_all(banner).await;
            });
            let name = name();
            pair.exposer().ok(&["expose", &at.to_string(), "--name", &name]);
            (name, format!("127.0.0.3{number}"), banner, service)
        })
        .collect();
    for (name, address, banner, _) in &services {
        let reached = pair.reacher.ok(&["reach", name, "--bind", address]);
        assert_eq!(reached, format!("{address}:{port}"), "its own port");
        check_greeted(reached.parse().expect("an address"), banner);
        // Without the option it stays where it is.
        assert_eq!(pair.reacher.ok(&["reach", name]), reached);
    }
    let Pair { workspace: _workspace, reacher, exposer_agent: _exposer_agent, mut reacher_agent } =
        pair;
    reacher_agent.kill();
    let _agent = reacher.up();
    let status = reacher.ok(&["status"]);
    for (name, address, banner, _) in &services {
        let reached = format!("{address}:{port}");
        assert!(status.contains(&reached), "{status}");
        check_greeted(reached.parse().expect("an address"), banner);
        // And it is remembered after it was let go of.
        reacher.ok(&["unreach", name]);
        assert_eq!(reacher.ok(&["reach", name]), reached);
    }
    let (name, ..) = &services[0];
    assert_eq!(reacher.ok(&["reach", name, "--bind", "127.0.0.1"]), format!("127.0.0.1:{port}"));
}

#[test]
fn addresses_that_others_can_connect_to_are_refused() {
    let home = Workspace::found(Hub::shared()).founder;
    for address in ["0.0.0.0", "10.0.0.1", "::", "192.168.1.1"] {
        home.fails(&["reach", "x", "--bind", address], 2, "no authentication of its own");
    }
    home.fails(&["reach", "x", "--bind", "localhost"], 2, "127.0.0.2");
}

#[test]
fn who_holds_a_port_is_said() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let name = name();
    pair.exposer().ok(&["expose", &service.address().to_string(), "--name", &name]);
    // The service's own port is held: by the service, in this process.
    let own = service.address().port();
    let outcome = pair.reacher.run(&["reach", &name]);
    assert_eq!(outcome.code, Some(0));
    let said = format!("{name} is not on port {own}, which is held by `");
    assert!(outcome.stderr.contains(&said), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains(&format!("(pid {})", std::process::id())),
        "{}",
        outcome.stderr
    );
    // Another one than the first time is said each time, and in JSON.
    let reached = pair.reacher.json(&["reach", &name]);
    let reason = reached["passed_over"].as_str().expect("a reason");
    assert!(reason.contains(&own.to_string()), "{reason}");
    // Asked for, it is an error.
    let part = format!("port {own} is held by `");
    pair.reacher.fails(&["reach", &name, "--port", &own.to_string()], 2, &part);
    // What the agent itself holds, for another service.
    let port = reached["address"].as_str().expect("text").rsplit(':').next().expect("a port");
    let other = self::name();
    pair.exposer().ok(&["expose", &service.address().to_string(), "--name", &other]);
    pair.reacher.fails(&["reach", &other, "--port", port], 2, "is held by this agent itself");
}

#[test]
fn pinned_port_stays_pinned() {
    let pair = Pair::start(Hub::shared());
    let service = Service::greeting(b"hello");
    let name = name();
    pair.exposer().ok(&["expose", &service.address().to_string(), "--name", &name]);
    let port = free_port("127.0.0.1").to_string();
    let address = format!("127.0.0.1:{port}");
    assert_eq!(pair.reacher.ok(&["reach", &name, "--port", &port]), address);
    pair.reacher.ok(&["reach", &name]);
    let state = fs::read(pair.reacher.dir().join("state.json")).expect("it is saved");
    let state: Value = serde_json::from_slice(&state).expect("JSON");
    assert_eq!(state["reaches"][0]["port"].to_string(), port);
    let Pair { workspace: _workspace, reacher, exposer_agent: _exposer_agent, mut reacher_agent } =
        pair;
    reacher_agent.kill();
    let _agent = reacher.up();
    check_greeted(address.parse().expect("an address"), b"hello");
}

#[test]
fn privileged_ports_say_so_to_users_who_may_not_have_them() {
    if !nix::unistd::geteuid().is_root() {
        // Without root there is nobody to become; the message is the same as for this user.
        let pair = Pair::start(Hub::shared());
        let name = name();
        let service = Service::echo();
        pair.exposer().ok(&["expose", &service.address().to_string(), "--name", &name]);
        pair.reacher.fails(&["reach", &name, "--port", "81"], 2, "privileged");
        return;
    }
    let nobody = 65534;
    let workspace = Workspace::found(Hub::shared());
    let _exposer = workspace.founder.up();
    let service = Service::echo();
    let name = name();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", &name]);
    let home = workspace.join("reacher");
    for (path, _) in home.snapshot() {
        std::os::unix::fs::chown(&path, Some(nobody), Some(nobody)).expect("we are root");
    }
    for dir in [home.dir().to_owned(), home.dir().join("trust"), home.dir().join("evidence")] {
        std::os::unix::fs::chown(&dir, Some(nobody), Some(nobody)).expect("we are root");
    }
    // The programs may be where that user cannot go.
    let copy = home.dir().with_file_name("connect");
    fs::copy(program("connect"), &copy).expect("our own directory");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(&copy);
        command.args(args).env("CONNECT_HOME", home.dir()).env_remove("XDG_RUNTIME_DIR");
        command.current_dir("/").uid(nobody).gid(nobody);
        Process::spawn("connect", &mut command)
    };
    let agent = run(&["up"]);
    agent.stderr_line(" connected hub=");
    let outcome = run(&["reach", &name, "--port", "81"]).outcome();
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("port 81 is privileged"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--port"), "{}", outcome.stderr);
    assert_eq!(run(&["down"]).outcome().code, Some(0));
}

#[test]
fn many_reaches_at_once_lose_no_port() {
    let home: Home = Workspace::found(Hub::shared()).founder;
    let _agent = home.up();
    let service = Service::greeting(b"hello");
    let target = service.address().to_string();
    let names: Vec<_> = (0..8).map(|_| name()).collect();
    let reached: Vec<_> = thread::scope(|scope| {
        let reaching: Vec<_> = names
            .iter()
            .map(|name| {
                scope.spawn(|| {
                    home.ok(&["expose", &target, "--name", name]);
                    home.reach(name)
                })
            })
            .collect();
        reaching.into_iter().map(|one| one.join().expect("it is reached")).collect()
    });
    let saved = fs::read(home.dir().join("ports.json")).expect("it is saved");
    let saved: Value = serde_json::from_slice(&saved).expect("JSON");
    for (name, address) in names.iter().zip(reached) {
        assert_eq!(saved[name], address.port());
    }
}

#[test]
fn damaged_ports_file_costs_no_more_than_the_ports() {
    let home = Workspace::found(Hub::shared()).founder;
    let mut agent = home.up();
    let service = Service::greeting(b"hello");
    let name = name();
    home.ok(&["expose", &service.address().to_string(), "--name", &name]);
    let address = home.reach(&name);
    agent.kill();
    fs::write(home.dir().join("ports.json"), b"\0\0\0").expect("our own file");
    let agent = home.up();
    agent.stderr_line("set aside");
    // It is derived from the name again.
    assert_eq!(home.reach(&name), address);
    check_greeted(address, b"hello");
}
