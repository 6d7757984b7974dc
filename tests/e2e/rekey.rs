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

/// A byte that tells where in the stream it belongs.
fn pattern(offset: usize) -> u8 {
    u8::try_from(offset % 251).expect("below 251")
}

/// Both directions at once, with new keys every few records: every byte arrives, in one tunnel.
#[test]
fn a_transfer_goes_on_through_a_thousand_rekeys() {
    const TOTAL: usize = 64_000_000;
    let pair = start(Hub::shared(), "records=20", "records=20");
    let service = Service::echo();
    let address = pair.carry(service.address(), "echo");
    let client = connect(address);
    let mut writing = client.try_clone().expect("one more handle");
    let writer = thread::spawn(move || {
        let bytes: Vec<u8> = (0..TOTAL).map(pattern).collect();
        writing.write_all(&bytes).expect("the connection does not break");
        writing.shutdown(std::net::Shutdown::Write).expect("it is whole to the end");
    });
    let mut reading = &client;
    let (mut received, mut part) = (0, vec![0; 64 * 1024]);
    loop {
        let length = reading.read(&mut part).expect("the connection does not break");
        if length == 0 {
            break;
        }
        for (index, byte) in part[..length].iter().enumerate() {
            assert_eq!(*byte, pattern(received + index), "at {}", received + index);
        }
        received += length;
    }
    assert_eq!(received, TOTAL);
    writer.join().expect("the writer is done");
    let rekeys = rekeys(&pair);
    assert!(rekeys >= 1000, "only {rekeys}");
    for agent in [&pair.exposer_agent, &pair.reacher_agent] {
        assert!(!agent.stderr().contains("tunnel ended"), "{}", agent.stderr());
    }
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
    for agent in [&pair.exposer_agent, &pair.reacher_agent] {
        assert!(!agent.stderr().contains("tunnel ended"), "{}", agent.stderr());
    }
}
