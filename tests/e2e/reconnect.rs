//! Everything comes back: hubs and agents that are killed, stopped, and started again.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Home, Pair, Workspace},
    hub::Hub,
    process::Process,
    random_word,
    services::Service,
};

/// A name of its own for each test: the local port follows from it, and must be free after a restart.
fn name() -> String {
    format!("svc-{}", random_word())
}

/// Waits until a client is served again.
#[track_caller]
fn check_served(address: SocketAddr, banner: &[u8]) {
    eventually("the service is reached", || {
        let Ok(mut client) = TcpStream::connect(address) else {
            return false;
        };
        client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        let mut read = vec![0; banner.len()];
        // A connection that falls into the break is reset: that is the data-plane's promise to come.
        client.read_exact(&mut read).is_ok() && read == banner
    });
}

#[track_caller]
fn check_connected(home: &Home) {
    eventually("the agent is connected", || home.run(&["status"]).code == Some(0));
}

#[test]
fn killed_hub_comes_back_and_so_does_everything() {
    let svc = &name();
    let mut hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let service = Service::greeting(b"hello");
    let address = pair.carry(service.address(), svc);
    check_served(address, b"hello");
    for _ in 0..2 {
        hub.kill();
        eventually("the agent notices", || pair.reacher.run(&["status"]).code == Some(4));
        hub.restart();
        check_connected(pair.exposer());
        check_connected(&pair.reacher);
        check_served(address, b"hello");
    }
    let listed = pair.reacher.json(&["services"]);
    assert_eq!(listed[0]["name"], svc.as_str());
    assert_eq!(listed[0]["online"], true);
    // New ones work, too: an old workspace at a new process.
    let other = Service::greeting(b"other");
    check_served(pair.carry(other.address(), "other"), b"other");
    pair.workspace.join("late").ok(&["services"]);
}

#[test]
fn stopped_hub_says_goodbye_and_agents_return() {
    let svc = &name();
    let mut hub = Hub::start(&[]);
    let pair = Pair::start(&hub);
    let service = Service::greeting(b"hello");
    let address = pair.carry(service.address(), svc);
    hub.stop();
    pair.reacher_agent.stderr_line("the hub restarts");
    hub.restart();
    check_served(address, b"hello");
}

#[test]
fn agents_restored_after_down_and_up_keep_their_ports() {
    let svc = &name();
    let pair = Pair::start(Hub::shared());
    let service = Service::greeting(b"hello");
    let address = pair.carry(service.address(), svc);
    let before = pair.exposer().json(&["status"])["exposed"][0]["service_id"].clone();
    let (exposer, reacher) = (pair.workspace.founder, pair.reacher);
    for (home, agent) in [(&exposer, pair.exposer_agent), (&reacher, pair.reacher_agent)] {
        home.ok(&["down"]);
        assert_eq!(agent.outcome().code, Some(0));
        home.fails(&["status"], 9, "connect up");
    }
    assert!(TcpStream::connect(address).is_err(), "the port is free");
    let (_one, _two) = (exposer.up(), reacher.up());
    check_served(address, b"hello");
    assert_eq!(exposer.json(&["status"])["exposed"][0]["service_id"], before);
    assert_eq!(reacher.json(&["status"])["reached"][0]["address"], address.to_string());

    // What is let go of stays away.
    reacher.ok(&["unreach", svc]);
    exposer.ok(&["unexpose", svc]);
    for home in [&exposer, &reacher] {
        home.ok(&["down"]);
    }
    let (_one, _two) = (exposer.up(), reacher.up());
    assert_eq!(exposer.json(&["status"])["exposed"].as_array().map(Vec::len), Some(0));
    assert_eq!(reacher.json(&["status"])["reached"].as_array().map(Vec::len), Some(0));
    reacher.fails(&["reach", svc], 5, svc);
}

#[test]
fn reacher_outlives_the_exposers_restart() {
    let svc = &name();
    let pair = Pair::start(Hub::shared());
    let service = Service::greeting(b"hello");
    let address = pair.carry(service.address(), svc);
    let Pair { workspace, reacher, mut exposer_agent, reacher_agent: _reacher_agent } = pair;
    exposer_agent.kill();
    eventually("the reacher notices", || {
        reacher.json(&["status"])["reached"][0]["active"] == false
    });
    let _agent = workspace.founder.up();
    check_served(address, b"hello");
}

#[test]
fn second_up_finds_the_first() {
    let home = Workspace::found(Hub::shared()).founder;
    let agent = home.up();
    let outcome = home.run(&["up"]);
    assert_eq!(outcome.code, Some(0));
    assert!(outcome.stderr.contains("already running"), "{}", outcome.stderr);
    let outcome = home.run(&["up", "--detach"]);
    assert_eq!(outcome.code, Some(0));
    assert!(outcome.stderr.contains("already running"), "{}", outcome.stderr);
    home.ok(&["down"]);
    assert_eq!(agent.outcome().code, Some(0));
}

#[test]
fn detached_agent_runs_until_it_is_told_to_stop() {
    let svc = &name();
    let home = Workspace::found(Hub::shared()).founder;
    home.ok(&["up", "--detach"]);
    check_connected(&home);
    let service = Service::greeting(b"hello");
    home.ok(&["expose", &service.address().to_string(), "--name", svc]);
    check_served(home.reach(svc), b"hello");
    home.ok(&["down"]);
    home.fails(&["down"], 9, "connect up");
}

#[test]
fn many_ups_at_once_make_one_agent() {
    let home = Workspace::found(Hub::shared()).founder;
    let ups: Vec<_> =
        (0..6).map(|_| Process::spawn("connect up", &mut home.command(&["up"]))).collect();
    eventually("one of them runs", || home.run(&["status"]).code == Some(0));
    let mut running = ups;
    eventually("the others have seen it", || {
        running.retain_mut(|up| !up.has_ended());
        running.len() == 1
    });
    let log = running[0].stderr();
    assert!(!log.contains("displaced"), "{log}");
    home.ok(&["down"]);
    assert_eq!(running.remove(0).outcome().code, Some(0));
}

#[test]
fn many_commands_at_once_are_all_done() {
    let home = Workspace::found(Hub::shared()).founder;
    let _agent = home.up();
    let service = Service::greeting(b"hello");
    let target = service.address().to_string();
    thread::scope(|scope| {
        for number in 0..8 {
            let (home, target) = (&home, &target);
            scope.spawn(move || {
                let name = format!("{}-{number}", name());
                home.ok(&["expose", target, "--name", &name]);
                check_served(home.reach(&name), b"hello");
            });
        }
    });
    let status = home.json(&["status"]);
    assert_eq!(status["exposed"].as_array().map(Vec::len), Some(8));
    assert_eq!(status["reached"].as_array().map(Vec::len), Some(8));
}

#[test]
fn killed_agent_leaves_nothing_in_the_way_of_the_next() {
    let svc = &name();
    let home = Workspace::found(Hub::shared()).founder;
    let service = Service::greeting(b"hello");
    let mut agent = home.up();
    home.ok(&["expose", &service.address().to_string(), "--name", svc]);
    let address = home.reach(svc);
    for _ in 0..3 {
        agent.kill();
        assert!(home.dir().join("agent.sock").exists(), "nobody could clean up");
        home.fails(&["status"], 9, "connect up");
        agent = home.up();
        check_served(address, b"hello");
    }
}

#[test]
fn copy_of_a_home_displaces_and_does_not_fight() {
    let workspace = Workspace::found(Hub::shared());
    let original = workspace.join("original");
    let copy = Home::new();
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .arg(original.dir())
        .arg(copy.dir())
        .status()
        .expect("there is cp");
    assert!(copied.success());
    let first = original.up();
    let second = copy.up();
    // The newest counts; the other one stays away and says why.
    let outcome = first.outcome();
    assert_eq!(outcome.code, Some(6), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("copy of this home"), "{}", outcome.stderr);
    assert_eq!(copy.json(&["status"])["connected"], true);
    drop(second);
}

#[test]
fn early_clients_wait_for_a_hub_that_is_not_up_yet() {
    let svc = &name();
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let service = Service::echo();
    let agent = workspace.founder.up();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", svc]);
    let address = workspace.founder.reach(svc);
    workspace.founder.ok(&["down"]);
    drop(agent);
    hub.stop();

    let _agent = Process::spawn("connect up", &mut workspace.founder.command(&["up"]));
    eventually("the port is bound before there is a hub", || TcpStream::connect(address).is_ok());
    let mut client = TcpStream::connect(address).expect("it was bound just now");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client.write_all(b"early").expect("the local port takes it");
    hub.restart();
    let mut echoed = [0; 5];
    client.read_exact(&mut echoed).expect("the client waited");
    assert_eq!(&echoed, b"early");
}

#[test]
fn many_services_of_one_exposer_are_reached_at_once_and_restored_at_once() {
    const SERVICES: usize = 24;
    let pair = Pair::start(Hub::shared());
    let service = Service::greeting(b"hello");
    let target = service.address().to_string();
    let prefix = name();
    let names: Vec<_> = (0..SERVICES).map(|number| format!("{prefix}-{number}")).collect();
    for name in &names {
        pair.exposer().ok(&["expose", &target, "--name", name]);
    }
    thread::scope(|scope| {
        for name in &names {
            let reacher = &pair.reacher;
            scope.spawn(move || check_served(reacher.reach(name), b"hello"));
        }
    });
    let Pair { workspace: _workspace, reacher, exposer_agent: _exposer_agent, mut reacher_agent } =
        pair;
    reacher_agent.kill();
    let _agent = reacher.up();
    eventually("all of them are back", || {
        let status = reacher.json(&["status"]);
        let reached = status["reached"].as_array().expect("a list");
        reached.len() == SERVICES && reached.iter().all(|reached| reached["active"] == true)
    });
}
