//! New static keys: nothing that is open notices, and copies of a home give themselves away.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
};

use connect_tests::{
    PATIENCE,
    client::Keys,
    eventually,
    home::{Home, Pair, Workspace},
    hub::Hub,
    process::new_dir,
    services::Service,
};
use serde_json::{Value, json};

fn open(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(address).expect("the port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client
}

#[track_caller]
fn echo(client: &mut TcpStream, text: &[u8]) {
    let mut echoed = vec![0; text.len()];
    client.write_all(text).expect("open");
    client.read_exact(&mut echoed).expect("open");
    assert_eq!(echoed, text);
}

fn json_of(home: &Home, file: &str) -> Value {
    serde_json::from_slice(&fs::read(home.dir().join(file)).expect("there")).expect("JSON")
}

/// Changes `membership.json` of a home whose agent does not run.
fn change_membership(home: &Home, change: impl FnOnce(&mut Value)) {
    let mut membership = json_of(home, "membership.json");
    change(&mut membership);
    let text = serde_json::to_vec(&membership).expect("JSON");
    fs::write(home.dir().join("membership.json"), text).expect("our own file");
}

/// Counter of the NoiseKey under which a reacher last saw an agent.
fn seen(reacher: &Home, agent: &Keys) -> Value {
    json_of(reacher, "trust/peers.json")["noise_keys"][agent.agent_id.to_string()]["counter"]
        .clone()
}

fn static_lines(home: &Home) -> Vec<String> {
    let keys = fs::read_to_string(home.dir().join("agent.key")).expect("enrolled");
    let names = keys.lines().filter_map(|line| line.split(' ').next());
    names.filter(|name| name.starts_with("static-")).map(str::to_owned).collect()
}

fn copy_dir(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.expect("there is cp").success());
}

fn copy(from: &Path) -> Home {
    let copy = Home::at(new_dir("copy").join("home"));
    copy_dir(from, copy.dir());
    copy
}

#[test]
fn open_connection_does_not_notice_that_keys_are_rotated() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let address = pair.carry(service.address(), "echo");
    let probes = service.probed();
    let mut client = open(address);
    echo(&mut client, b"before");
    for side in [pair.exposer(), &pair.reacher] {
        let before = Keys::of(side);
        assert_eq!(side.json(&["rotate"]), json!({ "counter": 2, "announced": true }));
        let after = Keys::of(side);
        assert_ne!(before.static_keypair.public(), after.static_keypair.public());
        echo(&mut client, b"the old connection");
        echo(&mut open(address), b"a new one");
    }
    assert_eq!(service.accepted(), probes + 3, "the first connection is the one it was");

    // A reacher that looks the service up anew uses the new key, with its own new one.
    let Pair { workspace, reacher, exposer_agent: _agent, reacher_agent } = pair;
    drop(client);
    drop(reacher_agent);
    let _reacher_agent = reacher.up();
    echo(&mut open(reacher.reach("echo")), b"a new tunnel");
    assert_eq!(seen(&reacher, &Keys::of(&workspace.founder)), 2);
    eventually("the exposer confirmed the reacher's new key", || {
        seen(&workspace.founder, &Keys::of(&reacher)) == 2
    });
}

#[test]
fn rotation_without_an_agent_or_a_hub_is_shown_at_the_next_login() {
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let home = &workspace.founder;
    let reacher = workspace.join("reacher");
    assert_eq!(home.json(&["rotate"]), json!({ "counter": 2, "announced": true }));
    hub.stop();
    assert_eq!(home.json(&["rotate"]), json!({ "counter": 3, "announced": false }));
    assert_eq!(static_lines(home), ["static-2", "static-3"]);

    // A crash between the two files that a rotation writes leaves the key that was there.
    let before = fs::read(home.dir().join("membership.json")).expect("enrolled");
    home.ok(&["rotate"]);
    fs::write(home.dir().join("membership.json"), before).expect("our own file");
    hub.restart();
    let _agent = home.up();
    assert_eq!(Keys::of(home).presented.noise_key.object().counter, 3);
    assert_eq!(home.json(&["rotate"]), json!({ "counter": 4, "announced": true }));

    let service = Service::echo();
    home.ok(&["expose", &service.address().to_string(), "--name", "echo"]);
    let _reacher_agent = reacher.up();
    echo(&mut open(reacher.reach("echo")), b"hello");
    assert_eq!(seen(&reacher, &Keys::of(home)), 4);
}

#[test]
fn old_key_is_rotated_by_itself_and_a_retired_one_forgotten() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let month = 30 * 24 * 3600;
    let made = json_of(home, "membership.json")["noise_key_made"].as_u64().expect("a time");
    change_membership(home, |membership| membership["noise_key_made"] = (made - month).into());
    let agent = home.up();
    agent.stderr_line("made a new static key");
    eventually("the new key is on disk", || static_lines(home) == ["static-1", "static-2"]);
    drop(agent);

    // Younger than what this agent is told to wait for, and the time of the retired one is over.
    change_membership(home, |membership| {
        membership["noise_key_made"] = (made - month).into();
        membership["retired_noise_key"]["until"] = made.into();
    });
    let _agent = home.up_with(&["--rotate-after", "31d"]);
    eventually("the retired key is gone", || static_lines(home) == ["static-2"]);
    assert!(json_of(home, "membership.json").get("retired_noise_key").is_none());
    assert_eq!(Keys::of(home).presented.noise_key.object().counter, 2);
    workspace.join("another").fails(&["up", "--rotate-after", "59m"], 2, "1 hour");
}

#[test]
fn copies_of_a_home_that_both_rotate_are_found_out() {
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let owner = workspace.join("owner");
    let thief = copy(owner.dir());
    hub.stop();
    let backup = new_dir("backup").join("hub");
    copy_dir(hub.data_dir(), &backup);
    hub.restart();

    owner.ok(&["rotate"]);
    // The copy shows an older key, then another key under the same counter.
    thief.fails(&["services"], 6, "newer");
    let outcome = thief.run(&["rotate"]);
    assert_eq!(outcome.code, Some(6), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("event=\"clone\""), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("hint: stop the copy"), "{}", outcome.stderr);
    eventually("the hub logged it", || {
        let log = hub.log();
        log.lines().any(|line| line.contains("event=\"clone\"") && line.contains("stop"))
    });
    let service = Service::echo();
    let exposer_agent = workspace.founder.up();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "echo"]);
    let owners_agent = owner.up();
    owner.reach("echo");
    let keys = Keys::of(&thief);
    eventually("the exposer confirmed the key", || seen(&workspace.founder, &keys) == 2);
    drop(owners_agent);

    // A hub that forgot what it knew lets the copy in. Peers do not forget.
    hub.stop();
    fs::remove_dir_all(hub.data_dir()).expect("our own directory");
    copy_dir(&backup, hub.data_dir());
    hub.restart();
    eventually("the exposer is back", || workspace.founder.run(&["status"]).code == Some(0));
    let _thiefs_agent = thief.up();
    let dialled = service.accepted();
    thief.fails(&["reach", "echo"], 6, "");
    exposer_agent.stderr_line("event=\"clone\"");
    assert_eq!(service.accepted(), dialled);
}
