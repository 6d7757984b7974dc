//! Open connections outlive the hub, and names outlive nobody they should not.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Pair, Workspace},
    hub::Hub,
    process::Process,
    services::Service,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A byte that tells where in the stream it belongs.
fn pattern(offset: usize) -> u8 {
    u8::try_from(offset % 251).expect("below 251")
}

/// An echo of 12 MB goes on through a hub that is killed in the middle of it, byte for byte.
#[test]
fn open_connection_survives_a_killed_hub() {
    const TOTAL: usize = 12_000_000;
    let mut hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let service = Service::echo();
    let address = pair.carry(service.address(), "echo");
    let probes = service.probed();
    let client = TcpStream::connect(address).expect("the port is bound");
    client.set_read_timeout(Some(2 * PATIENCE)).expect("our own socket");

    let mut writing = client.try_clone().expect("one more handle");
    let writer = thread::spawn(move || {
        let bytes: Vec<u8> = (0..TOTAL).map(pattern).collect();
        writing.write_all(&bytes).expect("the connection stalls, but does not break");
        writing.shutdown(std::net::Shutdown::Write).expect("it is whole to the end");
    });
    let mut reading = &client;
    let (mut received, mut part) = (0, vec![0; 64 * 1024]);
    let mut killed = 0;
    loop {
        let length = reading.read(&mut part).expect("the connection stalls, but does not break");
        if length == 0 {
            break;
        }
        for (index, byte) in part[..length].iter().enumerate() {
            assert_eq!(*byte, pattern(received + index), "at {}", received + index);
        }
        received += length;
        if received > TOTAL / 3 * (killed + 1) && killed < 2 {
            killed += 1;
            hub.kill();
            hub.restart();
        }
    }
    assert_eq!((received, killed), (TOTAL, 2));
    writer.join().expect("the writer is done");
    assert_eq!(service.accepted(), probes + 1, "it was one connection all along");
}

#[test]
fn idle_connection_survives_a_stopped_hub() {
    let mut hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let service = Service::echo();
    let address = pair.carry(service.address(), "echo");
    let mut client = TcpStream::connect(address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut echo = |text: &[u8]| {
        let mut echoed = vec![0; text.len()];
        client.write_all(text).expect("open");
        client.read_exact(&mut echoed).expect("open");
        assert_eq!(echoed, text);
    };
    echo(b"before");
    hub.stop();
    hub.restart();
    echo(b"after");
    let status = pair.reacher.json(&["status"]);
    assert_eq!(status["reached"][0]["streams"], 1);
}

/// A connection echoes on while the hub has no database, and nobody reconnects for it.
#[test]
fn open_connection_does_not_notice_that_the_database_dies() {
    let hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let service = Service::echo();
    let address = pair.carry(service.address(), "echo");
    let mut client = TcpStream::connect(address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut echo = || {
        let mut echoed = [0; 5];
        client.write_all(b"alive").expect("open");
        client.read_exact(&mut echoed).expect("open");
        assert_eq!(&echoed, b"alive");
    };
    echo();
    let tunnels = |hub: &Hub| hub.log().matches("tunnel ended").count();
    let before = tunnels(&hub);

    // Hidden, so that the hub cannot bring it back before we have seen it away.
    let (pgdata, hidden) = (hub.data_dir().join("postgres"), hub.data_dir().join("hidden"));
    let pid = fs::read_to_string(pgdata.join("postmaster.pid")).expect("it runs");
    let pid = pid.lines().next().and_then(|pid| pid.parse().ok()).expect("a process id");
    fs::rename(&pgdata, &hidden).expect("our own directory");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
    eventually("the hub notices", || {
        echo();
        hub.log().contains("the database is away")
    });
    let target = service.address().to_string();
    pair.workspace.founder.fails(&["expose", &target, "--name", "late"], 6, "database");
    for _ in 0..100 {
        echo();
    }
    fs::rename(&hidden, &pgdata).expect("our own directory");
    eventually("the database is back", || {
        echo();
        hub.log().contains("the database is back")
    });
    pair.workspace.founder.ok(&["expose", &target, "--name", "late"]);
    echo();
    let log = hub.log();
    let ends: Vec<_> = log.lines().filter(|line| line.contains("tunnel")).collect();
    assert_eq!(tunnels(&hub), before, "a tunnel was replaced: {ends:#?}");
}

/// An exposer that was restarted knows nothing of the connection: its client hears of it by RST.
#[test]
fn connection_to_a_restarted_exposer_is_reset_and_not_ended() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let address = pair.carry(service.address(), "echo");
    let mut client = TcpStream::connect(address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client.write_all(b"x").expect("open");
    client.read_exact(&mut [0]).expect("echoed");
    let Pair { workspace, reacher: _reacher, mut exposer_agent, reacher_agent: _agent } = pair;
    exposer_agent.kill();
    let _agent = workspace.founder.up();
    let error = client.read(&mut [0; 8]).expect_err("not a clean end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn foreground_expose_takes_its_service_with_it() {
    let workspace = Workspace::found(Hub::shared());
    let other = workspace.join("other");
    let service = Service::echo();
    let target = service.address().to_string();
    for (end, name) in [(Signal::SIGINT, "stopped"), (Signal::SIGKILL, "killed")] {
        let args = ["expose", target.as_str(), "--name", name];
        let agent = Process::spawn("connect expose", &mut workspace.founder.command(&args));
        agent.stdout_line(|line| (line == name).then_some(()));
        other.ok(&["services"]);
        agent.signal(end);
        let _ = agent.outcome();
        // What a killed one could not say, the next one does.
        let next = (end == Signal::SIGKILL).then(|| workspace.founder.up());
        eventually("the service is withdrawn", || {
            let listed = other.json(&["services"]);
            listed.as_array().is_some_and(|services| services.iter().all(|s| s["name"] != name))
        });
        drop(next);
    }
}

#[test]
fn service_withdrawn_without_a_hub_is_withdrawn_later() {
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let other = workspace.join("other");
    let service = Service::echo();
    let _agent = workspace.founder.up();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "gone"]);
    hub.kill();
    eventually("the agent notices", || workspace.founder.run(&["status"]).code == Some(4));
    workspace.founder.fails(&["unexpose", "gone"], 4, "hub");
    hub.restart();
    eventually("the service is withdrawn", || {
        other.run(&["services", "--json"]).stdout.trim() == "[]"
    });
}

#[test]
fn name_of_a_lost_agent_is_taken_over_only_when_asked_for() {
    let workspace = Workspace::found(Hub::shared());
    let heir = workspace.join("heir");
    let service = Service::greeting(b"old");
    let mut old = workspace.founder.up();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "db"]);
    let _agent = heir.up();
    let new = Service::greeting(b"new");
    let target = new.address().to_string();
    heir.fails(&["expose", &target, "--name", "db", "--take-over"], 6, "already exposed");
    old.kill();
    eventually("the hub notices", || heir.json(&["services"])[0]["online"] == false);
    heir.fails(&["expose", &target, "--name", "db"], 6, "--take-over");
    heir.ok(&["expose", &target, "--name", "db", "--take-over"]);
    let mut client = TcpStream::connect(heir.reach("db")).expect("the port is bound");
    client.set_read_timeout(Some(Duration::from_secs(10))).expect("our own socket");
    let mut banner = [0; 3];
    client.read_exact(&mut banner).expect("served by the new one");
    assert_eq!(&banner, b"new");
}

/// Whoever lets go of a service says so: the exposer must not keep the conversation for one who comes back.
#[test]
fn exposer_hears_at_once_that_a_service_is_let_go_of() {
    let hub = Hub::shared();
    let pair = Pair::start(hub);
    for command in [&["unreach", "svc"][..], &["down"]] {
        let (service, inbox) = Service::answering_at_the_end(b"");
        let mut client = TcpStream::connect(pair.carry(service.address(), "svc")).expect("a port");
        client.write_all(b"begun").expect("the tunnel takes it");
        eventually("the target gets it", || {
            inbox.received().first().is_some_and(|received| received.bytes == b"begun")
        });
        let start = Instant::now();
        pair.reacher.ok(command);
        eventually("the target's connection is reset", || {
            inbox.received().first().is_some_and(|received| received.clean == Some(false))
        });
        assert!(start.elapsed() < Duration::from_secs(10), "{command:?}: {:?}", start.elapsed());
    }
}
