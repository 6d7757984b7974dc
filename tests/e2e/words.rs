//! Command lines as people type them: without the command, with slips, and with nothing at all.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    process::Command,
    time::{Duration, Instant},
};

use connect_tests::{
    eventually,
    home::{Home, Pair, Workspace},
    hub::Hub,
    process::{Outcome, Process, new_dir},
    random_word,
    services::Service,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A mistake is told within this time, also when nobody answers.
const SOON: Duration = Duration::from_secs(8);

#[test]
fn a_target_alone_is_exposed_and_a_name_alone_is_reached() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let port = service.address().port();
    for (number, target) in
        [format!("localhost:{port}"), format!(":{port}"), port.to_string()].iter().enumerate()
    {
        let name = format!("svc-{}-{number}", random_word());
        assert_eq!(pair.exposer().ok(&[target, "--name", &name]), name);
        let address = pair.reacher.ok(&[&name]);
        assert_eq!(pair.reacher.json(&[&name])["address"], address.as_str());
        assert_eq!(pair.reacher.ok(&["reach", &name]), address);
    }
    // The name comes from the long form, too.
    let name = pair.exposer().ok(&[&port.to_string()]);
    let exposed = pair.exposer().json(&["status"])["exposed"].clone();
    let names: Vec<_> = exposed.as_array().expect("a list").iter().map(|e| &e["name"]).collect();
    assert!(names.contains(&&Value::from(name.as_str())), "{name} in {names:?}");
}

#[test]
fn a_name_alone_is_reached_in_the_foreground() {
    let workspace = Workspace::found(Hub::shared());
    let reacher = workspace.join("reacher");
    let _agent = workspace.founder.up();
    let service = Service::echo();
    let name = format!("svc-{}", random_word());
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", &name]);
    let reaching = Process::spawn("connect NAME", &mut reacher.command(&[&name]));
    reaching.stdout_line(|line| line.starts_with("127.0.0.1:").then_some(()));
    reaching.signal(Signal::SIGINT);
    assert_eq!(reaching.outcome().code, Some(0));
}

#[test]
fn slips_are_told_with_what_was_meant() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let target = service.address().to_string();
    let word = random_word();
    let name = format!("prod-{word}");
    pair.exposer().ok(&["expose", &target, "--name", &name]);
    let slip = format!("prdo-{word}");
    let meant = format!("did you mean `{name}`?");

    pair.reacher.fails(&["reach", &slip], 5, &meant);
    pair.reacher.fails(&[&slip], 5, &format!("did you mean `connect {name}`?"));
    pair.exposer().fails(&["unexpose", &slip], 5, &meant);
    pair.exposer().fails(&["share", &name, &slip], 5, &meant);
    pair.reacher.ok(&["reach", &name]);
    pair.reacher.fails(&["unreach", &slip], 5, &meant);
    pair.reacher.fails(&["unreach", "nothing-like-it"], 5, "connect status");

    // Commands and services are both meant.
    let near_a_command = format!("statu-{word}");
    pair.exposer().ok(&["expose", &target, "--name", &near_a_command]);
    pair.reacher.fails(&["statu"], 5, "`connect status` or `connect statu-");
    // A service whose name is like a command is reached all the same.
    pair.exposer().ok(&["expose", &target, "--name", "statuz"]);
    pair.reacher.ok(&["statuz"]);

    let outcome = pair.reacher.run(&["--json", &slip]);
    let error: Value = serde_json::from_str(&outcome.stderr).expect("JSON");
    assert_eq!(error["code"], "service_not_found");
    assert!(error["hint"].as_str().expect("text").contains(&name), "{error}");
    assert!(error["error"].as_str().expect("text").contains(&slip), "{error}");
}

#[test]
fn slips_are_told_soon_without_a_hub() {
    let mut hub = Hub::start(&[]);
    let home = Workspace::found(&hub).founder;
    hub.kill();
    for agent in [None, Some(())] {
        let _agent = agent.map(|()| Process::spawn("connect up", &mut home.command(&["up"])));
        for slip in ["exopse", "statsu", "serv"] {
            let start = Instant::now();
            home.fails(&[slip], 5, "did you mean `connect ");
            assert!(start.elapsed() < SOON, "{slip}: {:?}", start.elapsed());
        }
    }
    let fresh = Home::new();
    fresh.fails(&["exopse", "localhost:5432"], 5, "`connect expose`");
    fresh.fails(&["prod-db"], 3, "connect join");
}

#[test]
fn status_says_why_an_agent_is_not_connected() {
    let mut hub = Hub::start(&[]);
    let home = Workspace::found(&hub).founder;
    let _agent = home.up();
    hub.kill();
    eventually("a try to connect has failed", || {
        let outcome = home.run(&["status"]);
        outcome.code == Some(4) && outcome.stdout.contains("not connected: cannot reach the hub")
    });
    let outcome = home.run(&["status"]);
    assert!(outcome.stderr.contains("is `connect-hub serve` running there?"), "{outcome:?}");
    let said = home.ok(&[]);
    assert!(said.contains("It goes on trying to connect.\nis the address right"), "{said}");
    let status: Value =
        serde_json::from_str(&home.run(&["--json", "status"]).stdout).expect("JSON");
    assert_eq!(status["error"]["code"], "hub_unreachable");
}

#[test]
fn connect_alone_says_where_one_is_and_what_is_next() {
    let fresh = Home::new();
    let said = fresh.ok(&[]);
    assert!(said.contains("connect init") && said.contains("connect join"), "{said}");
    assert!(said.lines().count() <= 4, "{said}");
    assert_eq!(fresh.json(&[])["enrolled"], false);
    assert!(!fresh.dir().exists(), "looking changes nothing");

    let home = Workspace::found(Hub::shared()).founder;
    let said = home.ok(&[]);
    assert!(said.contains("founder") && said.contains("connect up --detach"), "{said}");
    assert_eq!(home.json(&[])["running"], false);

    let _agent = home.up();
    let said = home.ok(&[]);
    assert!(said.contains("connected") && said.contains("connect services"), "{said}");
    assert_eq!(home.json(&[])["status"]["connected"], true);
}

#[test]
fn home_whose_path_is_no_text_is_a_home() {
    let dir = new_dir("path").join(OsStr::from_bytes(b"not\xfftext"));
    let home = Home::at(&dir);
    let said = home.json(&[]);
    assert_eq!(said["home"], dir.to_string_lossy().as_ref());
    home.fails(&["services"], 3, "connect join");
}

/// What becomes of a shell line with `connect` in it as `"$0"`.
fn in_shell(home: &Home, line: &str) -> Outcome {
    let connect = home.command(&[]);
    let mut command = Command::new("bash");
    command.args(["-c", line]).arg(connect.get_program());
    for (name, value) in connect.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    Process::spawn(line, &mut command).outcome()
}

#[test]
fn output_that_is_lost_is_an_error_and_a_reader_that_left_is_none() {
    let home = Workspace::found(Hub::shared()).founder;
    for line in ["invite", "agents --json", "completions bash", "verify", ""] {
        let outcome = in_shell(&home, &format!("\"$0\" {line} > /dev/full"));
        assert_eq!(outcome.code, Some(1), "{line}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("the output cannot be written: No space"), "{line}");
        assert!(outcome.stderr.contains("what it printed is lost"), "{}", outcome.stderr);
        let left = in_shell(&home, &format!("set -o pipefail; \"$0\" {line} | head -c 1"));
        assert_eq!(left.code, Some(0), "{line}: {}", left.stderr);
        assert_eq!(left.stdout.len(), 1);
    }
}

#[test]
fn following_ends_with_its_reader() {
    let home = Workspace::found(Hub::shared()).founder;
    home.ok(&["up", "--detach"]);
    for line in ["audit --follow", "logs --follow"] {
        let outcome = in_shell(&home, &format!("set -o pipefail; \"$0\" {line} | head -n 1"));
        assert_eq!(outcome.code, Some(0), "{line}: {}", outcome.stderr);
        assert_eq!(outcome.stdout.lines().count(), 1, "{line}");
    }
    home.ok(&["down"]);
}

#[test]
fn wrong_command_lines_are_usage_errors_in_words_and_in_json() {
    let home = Home::new();
    home.fails(&["reach"], 2, "<NAME>");
    home.fails(&["status", "--nonsense"], 2, "--nonsense");
    home.fails(&["help", "nonsense"], 2, "nonsense");
    let outcome = home.run(&["status", "--json", "--nonsense"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""));
    let error: Value = serde_json::from_str(&outcome.stderr).expect("JSON");
    assert_eq!(error["code"], "usage");
    assert!(error["error"].as_str().expect("text").contains("--nonsense"), "{error}");
    assert!(error["hint"].is_string(), "{error}");
}
