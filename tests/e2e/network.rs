//! Networks that stand still, break, and come back: connections stall, and lose nothing.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use connect_tests::{
    PATIENCE,
    home::{Home, Workspace},
    hub::Hub,
    network::Network,
    process::Process,
    random,
    services::Service,
};

/// So long the network is gone in these tests.
const GONE: Duration = Duration::from_secs(5);
/// So soon data flows again once it is back.
const BACK: Duration = Duration::from_secs(5);

/// Two agents, each behind a network of its own, and an echo that one reaches at the other.
struct Stage {
    exposers: Network,
    reachers: Network,
    service: Service,
    address: SocketAddr,
    _agents: [Process; 2],
    _homes: (Workspace, Home),
}

impl Stage {
    fn set() -> Self {
        let hub = Hub::shared();
        let (exposers, reachers) = (Network::start(hub), Network::start(hub));
        let workspace = Workspace::found_at(&exposers.url());
        let code = workspace.founder.ok(&["invite"]);
        let reacher = Home::new();
        reacher.ok(&["join", &code, "--label", "reacher"]);
        let membership = reacher.dir().join("membership.json");
        let text = std::fs::read_to_string(&membership).expect("enrolled");
        std::fs::write(&membership, text.replace(&exposers.url(), &reachers.url()))
            .expect("our own file");
        let agents = [workspace.founder.up(), reacher.up()];
        let service = Service::echo();
        workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "echo"]);
        let address = reacher.reach("echo");
        Self { exposers, reachers, service, address, _agents: agents, _homes: (workspace, reacher) }
    }
}

/// Echoes bytes for as long as it takes to break the network and mend it, in the middle of them.
#[track_caller]
fn check(breaking: fn(&Stage), mending: fn(&Stage)) {
    let stage = Stage::set();
    let probes = stage.service.probed();
    let client = TcpStream::connect(stage.address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let bytes = random(1 << 20);
    let (mut writing, sent) = (client.try_clone().expect("one more handle"), bytes.clone());
    let (written, halfway) = std::sync::mpsc::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    let writer = thread::spawn(move || {
        writing.write_all(&sent[..1 << 19]).expect("open");
        written.send(()).expect("the test listens");
        goes_on.recv().expect("the test says so");
        // Into the broken network.
        writing.write_all(&sent[1 << 19..]).expect("it stalls, but does not break");
        writing.shutdown(std::net::Shutdown::Write).expect("it is whole to the end");
    });
    halfway.recv().expect("half of it is written");
    let mut reading = &client;
    let mut read = vec![0; 1 << 16];
    reading.read_exact(&mut read).expect("open");
    breaking(&stage);
    go_on.send(()).expect("the writer waits");
    // Nobody announces that nothing happens.
    thread::sleep(GONE);
    mending(&stage);
    let mended = Instant::now();
    let mut rest = Vec::new();
    let mut part = vec![0; 1 << 16];
    // What was on its way to us comes first; the last byte was written into the broken network.
    let mut back = None;
    loop {
        let length = reading.read(&mut part).expect("it stalls, but does not break");
        if length == 0 {
            break;
        }
        rest.extend_from_slice(&part[..length]);
        if rest.len() > (1 << 19) {
            back.get_or_insert_with(|| mended.elapsed());
        }
    }
    read.extend_from_slice(&rest);
    assert!(read == bytes, "a byte was lost, repeated or altered");
    writer.join().expect("everything was written");
    let back = back.expect("all of it came");
    assert!(back < BACK, "data flowed again only after {back:?}");
    assert_eq!(stage.service.accepted(), probes + 1, "it was one connection all along");
}

#[test]
fn network_that_stands_still_for_five_seconds_loses_nothing() {
    for one_side in [
        (|stage| stage.reachers.stall(), |stage| stage.reachers.flow()),
        (|stage| stage.exposers.stall(), |stage| stage.exposers.flow()),
    ] as [(fn(&Stage), fn(&Stage)); 2]
    {
        check(one_side.0, one_side.1);
    }
}

/// The old connections are dead when the network is back: the agents are somewhere else.
#[test]
fn agents_whose_connections_die_go_on_with_new_ones() {
    check(
        |stage| {
            stage.reachers.stall();
            stage.exposers.stall();
        },
        |stage| {
            for network in [&stage.reachers, &stage.exposers] {
                network.cut();
                network.flow();
            }
        },
    );
}

/// Connections that are only reset, again and again, while an idle and a busy stream are open.
#[test]
fn connections_that_are_reset_again_and_again_lose_nothing() {
    let stage = Stage::set();
    let mut client = TcpStream::connect(stage.address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    for round in 0..10 {
        let text = random(10_000);
        client.write_all(&text).expect("open");
        if round % 2 == 0 {
            stage.reachers.cut();
        } else {
            stage.exposers.cut();
        }
        let mut echoed = vec![0; text.len()];
        client.read_exact(&mut echoed).expect("open");
        assert!(echoed == text, "round {round}");
    }
}
