//! Tunnels get new keys while they are used, and nobody but their two ends has a part in it.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    thread,
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Home, Pair, Workspace},
    hub::Hub,
    process::Process,
    services::Service,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Starts an agent whose tunnels get new keys after so much use.
fn up(home: &Home, rekey_after: &str) -> Process {
    let mut command = home.command(&["up"]);
    command.env("CONNECT_LOG", "debug").env("CONNECT_REKEY_AFTER", rekey_after);
    let process = Process::spawn("connect up", &mut command);
    process.stderr_line(" connected hub=");
    process
}

fn start(hub: &Hub, exposer_after: &str, reacher_after: &str) -> Pair {
    let workspace = Workspace::found(hub);
    let reacher = workspace.join("reacher");
    let exposer_agent = up(&workspace.founder, exposer_after);
    let reacher_agent = up(&reacher, reacher_after);
    Pair { workspace, reacher, exposer_agent, reacher_agent }
}

fn rekeys(pair: &Pair) -> u64 {
    pair.reacher.json(&["status"])["reached"][0]["rekeys"].as_u64().expect("a number")
}

fn connect(address: std::net::SocketAddr) -> TcpStream {
    let client = TcpStream::connect(address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client
}

fn echo(client: &mut TcpStream, text: &[u8]) {
    let mut echoed = vec![0; text.len()];
    client.write_all(text).expect("open");
    client.read_exact(&mut echoed).expect("open");
    assert_eq!(echoed, text);
}

fn no_tunnel_ended(pair: &Pair) {
    assert!(!pair.exposer_agent.stderr().contains("tunnel ended"));
    assert!(!pair.reacher_agent.stderr().contains("no tunnel"));
}

/// A byte that tells where in the stream it belongs.
fn pattern(offset: usize) -> u8 {
    u8::try_from(offset % 251).expect("below 251")
}

/// Tens of megabytes there and back, with new keys every few records: every byte arrives, in one tunnel.
#[test]
fn a_transfer_goes_on_through_a_thousand_rekeys() {
    const PART: usize = 16 * 1024;
    const AT_LEAST: usize = 32_000_000;
    const REKEYS: u64 = 1000;
    let pair = start(Hub::shared(), "records=4", "records=4");
    let service = Service::echo();
    let mut client = connect(pair.carry(service.address(), "echo"));
    let part =
        |number: usize| -> Vec<u8> { (number * PART..(number + 1) * PART).map(pattern).collect() };
    // One part is always on its way, and no more: what waits in buffers would hold new keys up.
    client.write_all(&part(0)).expect("open");
    let mut echoed = vec![0; PART];
    let mut parts = 0;
    while parts * PART < AT_LEAST || rekeys(&pair) < REKEYS {
        for _ in 0..64 {
            client.write_all(&part(parts + 1)).expect("the connection does not break");
            client.read_exact(&mut echoed).expect("the connection does not break");
            assert_eq!(echoed, part(parts), "part {parts}");
            parts += 1;
        }
        assert!(parts * PART < 8 * AT_LEAST, "only {} rekeys", rekeys(&pair));
    }
    client.read_exact(&mut echoed).expect("the last part");
    assert_eq!(echoed, part(parts));
    no_tunnel_ended(&pair);
}

/// With as much on its way as there is room for.
#[test]
fn a_full_pipe_goes_on_through_rekeys() {
    const TOTAL: usize = 12_000_000;
    let pair = start(Hub::shared(), "records=20", "records=20");
    let service = Service::echo();
    let client = connect(pair.carry(service.address(), "echo"));
    let mut writing = client.try_clone().expect("one more handle");
    let writer = thread::spawn(move || {
        let bytes: Vec<u8> = (0..TOTAL).map(pattern).collect();
        writing.write_all(&bytes).expect("the connection does not break");
        writing.shutdown(std::net::Shutdown::Write).expect("it is whole to the end");
    });
    let mut received = Vec::new();
    (&client).read_to_end(&mut received).expect("the connection does not break");
    writer.join().expect("the writer is done");
    assert_eq!(received.len(), TOTAL);
    let wrong = received.iter().enumerate().find(|(at, byte)| **byte != pattern(*at));
    assert_eq!(wrong, None);
    assert!(rekeys(&pair) >= 3, "only {}", rekeys(&pair));
    no_tunnel_ended(&pair);
}

/// The reacher would not begin by itself: the exposer's own limit makes it ask.
#[test]
fn an_exposer_gets_new_keys_by_asking_for_them() {
    let pair = start(Hub::shared(), "records=20", "seconds=120");
    let service = Service::echo();
    let mut client = connect(pair.carry(service.address(), "echo"));
    eventually("keys were replaced five times", || {
        for _ in 0..20 {
            echo(&mut client, b"x");
        }
        rekeys(&pair) >= 5
    });
}

/// Rekeying uses the static keys of its moment. One that the exposer has forgotten ends the tunnel, for the
/// reacher must look the new one up, and the connection goes on in the next.
#[test]
fn static_keys_rotate_under_a_living_tunnel() {
    let pair = start(Hub::shared(), "seconds=1", "seconds=1");
    let service = Service::echo();
    let mut client = connect(pair.carry(service.address(), "echo"));
    echo(&mut client, b"before");
    pair.exposer().ok(&["rotate"]);
    pair.reacher.ok(&["rotate"]);
    let before = rekeys(&pair);
    eventually("keys are replaced", || rekeys(&pair) >= before + 3);
    echo(&mut client, b"between");
    no_tunnel_ended(&pair);

    pair.exposer().ok(&["rotate"]);
    pair.exposer_agent.stderr_line("its keys were not replaced: handshake message does not open");
    let before = rekeys(&pair);
    eventually("keys are replaced in the next tunnel", || rekeys(&pair) >= before + 3);
    echo(&mut client, b"after");
}

/// A hub's PostgreSQL that answers nothing until this is dropped.
struct StoppedDatabase(Vec<Pid>);

impl StoppedDatabase {
    fn of(hub: &Hub) -> Self {
        let read = |path: &Path| fs::read_to_string(path).expect("it runs");
        let lock = read(&hub.data_dir().join("postgres/postmaster.pid"));
        let postmaster = lock.lines().next().expect("its process id");
        let children = read(Path::new(&format!("/proc/{postmaster}/task/{postmaster}/children")));
        let all = std::iter::once(postmaster).chain(children.split_whitespace());
        let all = all.map(|pid| Pid::from_raw(pid.parse().expect("a process id"))).collect();
        let stopped = Self(all);
        stopped.signal(Signal::SIGSTOP);
        stopped
    }

    fn signal(&self, signal: Signal) {
        for pid in &self.0 {
            // A backend may have ended since it was listed.
            let _ = kill(*pid, signal);
        }
    }
}

impl Drop for StoppedDatabase {
    fn drop(&mut self) {
        self.signal(Signal::SIGCONT);
    }
}

/// Living tunnels need nothing of the hub but its relay: no session, no database.
#[test]
fn keys_are_replaced_without_the_hubs_control_side() {
    let hub = Hub::start(&[]);
    let pair = start(&hub, "seconds=1", "seconds=1");
    let service = Service::echo();
    let mut client = connect(pair.carry(service.address(), "echo"));
    echo(&mut client, b"before");
    let _stopped = StoppedDatabase::of(&hub);
    let before = rekeys(&pair);
    eventually("keys are replaced", || rekeys(&pair) >= before + 3);
    echo(&mut client, b"after");
    no_tunnel_ended(&pair);
}
