//! `connect doctor`: what it finds where all is well, and for each thing that is wrong.

use std::{
    fs::{self, Permissions},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
};

use connect_tests::{
    home::{Home, Workspace},
    hub::Hub,
    process::{Outcome, Process},
    services::Service,
};
use serde_json::Value;

/// Runs the doctor in a locale that writes what people read.
fn doctor(home: &Home) -> Outcome {
    let mut command = home.command(&["doctor"]);
    Process::spawn("connect doctor", command.env("LC_ALL", "C.UTF-8")).outcome()
}

/// The state and text of a finding, and what to do.
fn finding(home: &Home, what: &str) -> (String, String, String) {
    let outcome = home.run(&["--json", "doctor"]);
    let report: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let findings = report["findings"].as_array().expect("a list");
    let found = findings.iter().find(|finding| finding["what"] == what);
    let found = found.unwrap_or_else(|| panic!("no `{what}` in {report}"));
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    (text("state"), text("text"), text("hint"))
}

#[track_caller]
fn fails(home: &Home, code: i32, line: &str) {
    let outcome = doctor(home);
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    assert!(outcome.stdout.contains(line), "{outcome:?}");
    assert!(outcome.stderr.starts_with("error: "), "{outcome:?}");
}

#[test]
fn all_is_well_with_an_agent_and_without() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let titles = |outcome: &Outcome| {
        let lines = outcome.stdout.lines().filter(|line| !line.starts_with(' '));
        let title = |line: &str| line.split("  ").next().unwrap_or_default().to_owned();
        lines.map(title).collect::<Vec<_>>()
    };
    let before = home.snapshot();
    let outcome = doctor(home);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(
        titles(&outcome),
        [
            "✓ Permissions",
            "✓ Keys",
            "✓ Membership",
            "✓ State",
            "⚠ Agent",
            "✓ Trust log",
            "✓ Open files",
            "✓ Hub",
            "✓ Clock",
            "✓ Login",
            "✓ Self-test"
        ],
        "{outcome:?}"
    );
    assert!(outcome.stdout.contains("connect up --detach"), "a warning says what to do");
    let lasting = |name: &std::path::Path| {
        ["agent.key", "membership.json", "ports.json"].iter().any(|kept| name.ends_with(kept))
    };
    let kept = |files: Vec<(std::path::PathBuf, Vec<u8>)>| {
        files.into_iter().filter(|(path, _)| lasting(path)).collect::<Vec<_>>()
    };
    assert_eq!(kept(home.snapshot()), kept(before));

    let mut agent = home.up();
    let outcome = doctor(home);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stdout.contains("✓ Agent"), "{outcome:?}");
    assert!(outcome.stdout.contains("✓ Self-test"), "{outcome:?}");
    assert!(!agent.has_ended(), "the running agent did it");
    assert_eq!(home.json(&["doctor"])["ok"], true);
    // Nothing of the tests is left, at the hub or here.
    assert_eq!(home.json(&["services"]), Value::Array(vec![]));
    for (path, content) in home.snapshot() {
        let content = String::from_utf8_lossy(&content).into_owned();
        assert!(!content.contains("self-test"), "{}", path.display());
    }
}

#[test]
fn a_home_that_joined_nothing_is_told_how() {
    let home = Home::new();
    fails(&home, 3, "✗ Home");
    assert!(finding(&home, "home").2.contains("connect join CODE"));
}

#[test]
fn a_hub_that_is_gone_is_what_is_wrong() {
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    hub.kill();
    fails(&workspace.founder, 4, "✗ Hub");
    assert!(finding(&workspace.founder, "hub").2.contains("connect-hub serve"));
    // What can be seen without it is well.
    assert_eq!(finding(&workspace.founder, "membership").0, "ok");
}

#[test]
fn keys_that_others_can_read_are_found_and_the_command_mends_it() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let key = home.dir().join("agent.key");
    fs::set_permissions(&key, Permissions::from_mode(0o644)).expect("our own file");
    fails(home, 7, "is open to other users");
    let (_, _, hint) = finding(home, "permissions");
    let command = hint.strip_prefix("run `").and_then(|rest| rest.strip_suffix('`'));
    let mended =
        std::process::Command::new("sh").args(["-c", command.expect("a command")]).status();
    assert!(mended.expect("there is a shell").success());
    assert_eq!(finding(home, "permissions").0, "ok");
    fs::set_permissions(home.dir(), Permissions::from_mode(0o755)).expect("our own directory");
    fails(home, 7, "chmod 700");
}

#[test]
fn damaged_state_is_found() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let state = home.dir().join("ports.json");
    fs::write(&state, "{").expect("our own directory");
    fs::set_permissions(&state, Permissions::from_mode(0o600)).expect("our own file");
    let (state, text, _) = finding(home, "state");
    assert_eq!(state, "fail");
    assert!(text.contains("ports.json"), "{text}");
}

#[test]
fn a_local_port_that_somebody_took_is_a_warning() {
    let workspace = Workspace::found(Hub::shared());
    let exposer = workspace.join("exposer");
    let _exposing = exposer.up();
    let echo = Service::echo();
    exposer.ok(&["expose", &echo.address().to_string(), "--name", "echo"]);
    let home = &workspace.founder;
    let agent = home.up();
    let address = home.reach("echo");
    assert_eq!(finding(home, "ports").0, "ok", "the agent holds it");
    home.ok(&["down"]);
    drop(agent);
    assert_eq!(finding(home, "ports").0, "ok", "it is free");
    let _taken = TcpListener::bind(address).expect("it is free");
    let (state, text, hint) = finding(home, "ports");
    assert_eq!(state, "warn");
    assert!(text.contains(&address.port().to_string()) && hint.contains("--port"), "{text} {hint}");
    assert_eq!(doctor(home).code, Some(0), "a warning is no failure");
}

#[test]
fn a_revoked_agent_hears_so() {
    let workspace = Workspace::found(Hub::shared());
    let home = workspace.join("former");
    workspace.founder.ok(&["revoke", "former", "--yes"]);
    let outcome = doctor(&home);
    assert!(matches!(outcome.code, Some(6 | 7)), "{outcome:?}");
    assert!(outcome.stdout.contains('✗') && outcome.stdout.contains("revoked"), "{outcome:?}");
}
