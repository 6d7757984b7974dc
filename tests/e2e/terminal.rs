//! What people see on a terminal, and what completes their command lines.

use std::{fs, process::Command};

use connect_tests::{
    home::{Home, Workspace},
    hub::Hub,
    process::Process,
    random_word,
    services::Service,
};

/// What a command shows on a terminal of so many columns.
fn on_terminal(home: &Home, columns: &str, line: &str) -> String {
    let program = home.command(&[]).get_program().to_string_lossy().into_owned();
    let mut command = Command::new("script");
    command
        .args(["-qec", &format!("'{program}' {line}"), "/dev/null"])
        .env("CONNECT_HOME", home.dir())
        .env("COLUMNS", columns)
        .env("TERM", "xterm")
        .env_remove("NO_COLOR");
    Process::spawn("script", &mut command).outcome().stdout
}

#[test]
fn terminals_have_colours_headers_and_no_cut_names() {
    let home = Workspace::found(Hub::shared()).founder;
    let _agent = home.up();
    let service = Service::echo();
    let name = format!("a-name-that-is-rather-long-{}", random_word());
    home.ok(&["expose", &service.address().to_string(), "--name", &name]);

    let plain = home.ok(&["services"]);
    assert!(!plain.contains('\x1b') && !plain.contains("NAME"), "{plain}");
    let coloured = home.ok(&["services", "--color", "always"]);
    assert!(coloured.contains("\x1b[32monline"), "{coloured}");
    let shown = on_terminal(&home, "120", "services");
    assert!(shown.contains("NAME") && shown.contains("\x1b[32monline"), "{shown}");
    let shown = on_terminal(&home, "120", "services --color never");
    assert!(shown.contains("NAME") && !shown.contains('\x1b'), "{shown}");
    let shown = on_terminal(&home, "20", "services --color never");
    assert_eq!(shown.lines().next(), Some(name.as_str()), "{shown}");
    let status = on_terminal(&home, "30", "status --color never");
    assert!(status.contains(&name), "{status}");

    let outcome = home.run(&["unexpose", "x", "--color", "always"]);
    assert!(outcome.stderr.contains("\x1b[1m\x1b[31merror:"), "{:?}", outcome.stderr);
    let outcome = home.run(&["--nonsense", "--color=always"]);
    assert!(outcome.stderr.contains('\x1b'), "{:?}", outcome.stderr);
    assert!(!home.run(&["--nonsense"]).stderr.contains('\x1b'));
}

#[test]
fn waiting_is_shown_on_a_terminal_only() {
    let home = Workspace::found(Hub::shared()).founder;
    // A reach in a home whose lock is held and which has no socket: it waits for five seconds.
    let lock = fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(home.dir().join("agent.lock"));
    let lock = lock.expect("our own directory");
    lock.lock().expect("nobody has it");
    let shown = on_terminal(&home, "80", "reach x");
    assert!(shown.contains("Waiting for `x` …"), "{shown:?}");
    assert!(!on_terminal(&home, "80", "reach x --quiet").contains("Waiting"));
    let outcome = home.run(&["reach", "x"]);
    assert_eq!(outcome.code, Some(9));
    assert!(!outcome.stderr.contains("Waiting"), "{}", outcome.stderr);
}

#[test]
fn completions_are_scripts_that_the_shell_reads() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = home.ok(&["completions", shell]);
        for word in ["expose", "reach", "daemon", "completions"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let script = home.dir().with_extension("bash");
    fs::write(&script, home.ok(&["completions", "bash"])).expect("our own directory");
    // What bash itself would do for `connect ser<TAB>`.
    let ask = "source \"$1\"; COMP_WORDS=(connect ser); COMP_CWORD=1; _connect connect ser connect; echo \"${COMPREPLY[@]}\"";
    let mut command = Command::new("bash");
    let outcome = Process::spawn("bash", command.args(["-c", ask, "bash"]).arg(&script)).outcome();
    assert_eq!(outcome.stdout.trim(), "services", "{}", outcome.stderr);
}
