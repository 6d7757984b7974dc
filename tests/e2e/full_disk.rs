//! Homes that cannot be written, or not even read.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use connect_tests::{
    home::{Home, Workspace},
    hub::Hub,
    process::{Outcome, Process},
    random_word,
    services::Service,
};

/// A command with other limits than ours.
fn limited(home: &Home, limit: &str, args: &[&str]) -> Command {
    let inner = home.command(args);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limit}; exec \"$@\""), "sh"]);
    command.arg(inner.get_program()).args(inner.get_args()).current_dir("/");
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Changes how long files may get that a running process writes.
fn limit_files(process: &Process, limit: &str) {
    let mut command = Command::new("prlimit");
    command.args([&format!("--pid={}", process.id()), &format!("--fsize={limit}")]);
    assert!(command.status().expect("there is prlimit").success());
}

#[test]
fn agent_on_a_full_disk_goes_on_and_harms_nothing() {
    let home = Workspace::found(Hub::shared()).founder;
    let service = Service::echo();
    let target = service.address().to_string();
    let names = [random_word(), random_word()].map(|word| format!("svc-{word}"));
    let mut agent = home.up();
    home.ok(&["expose", &target, "--name", &names[0]]);
    let address = home.reach(&names[0]);
    let before = home.snapshot();

    // No file may grow from now on, which is what a full disk is; the signal must not end the agent.
    limit_files(&agent, "0:unlimited");
    home.fails(&["expose", &target, "--name", &names[1]], 1, "cannot write to");
    home.fails(&["expose", &target, "--name", &names[1]], 1, "make room there");
    assert_eq!(home.reach(&names[0]), address, "what is bound goes on");
    assert_eq!(home.json(&["status"])["connected"], true);
    // Nothing is half, and nothing is left beside.
    assert_eq!(home.snapshot(), before);

    // Killed, and started on the full disk: it is there and says what is wrong.
    agent.kill();
    let agent = Process::spawn("connect up", &mut limited(&home, "ulimit -f 0", &["up"]));
    agent.stderr_line("cannot write to");
    assert_eq!(home.run(&["status"]).code, Some(4));
    home.ok(&["down"]);
    assert_eq!(agent.outcome().code, Some(0));

    let _agent = home.up();
    assert_eq!(home.reach(&names[0]), address);
    let exposed = home.json(&["status"])["exposed"].clone();
    assert_eq!(exposed.as_array().map(Vec::len), Some(1), "{exposed}");
}

#[test]
fn commands_on_a_full_disk_say_so_and_leave_nothing_half() {
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite"]);
    let home = Home::new();
    let run = |args: &[&str]| {
        Process::spawn("connect", &mut limited(&home, "ulimit -f 0", args)).outcome()
    };
    let Outcome { code: exit, stdout, stderr } = run(&["join", &code]);
    assert_eq!((exit, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("cannot write to") && stderr.contains("make room"), "{stderr}");
    home.fails(&["status"], 3, "connect join");
    let home = Home::new();
    let code = workspace.founder.ok(&["invite"]);
    home.ok(&["join", &code]);
}

#[test]
fn homes_of_others_are_told_apart_from_no_home() {
    if !nix::unistd::geteuid().is_root() {
        let home = Workspace::found(Hub::shared()).founder;
        fs::set_permissions(home.dir(), fs::Permissions::from_mode(0o000)).expect("our own");
        home.fails(&["status"], 1, "is it yours?");
        home.fails(&[], 1, "is it yours?");
        fs::set_permissions(home.dir(), fs::Permissions::from_mode(0o700)).expect("our own");
        return;
    }
    let home = Workspace::found(Hub::shared()).founder;
    // The programs may be where that user cannot go.
    let copy = home.dir().with_file_name("connect");
    fs::copy(connect_tests::process::program("connect"), &copy).expect("our own directory");
    let as_nobody = |args: &[&str]| {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(&copy);
        command.args(args).env("CONNECT_HOME", home.dir()).env_remove("XDG_RUNTIME_DIR");
        Process::spawn("connect", command.current_dir("/").uid(65534).gid(65534)).outcome()
    };
    for args in [&["status"][..], &[], &["up"], &["services"], &["reach", "x"]] {
        let Outcome { code, stdout, stderr } = as_nobody(args);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{args:?}: {stderr}");
        assert!(stderr.contains("cannot read") && stderr.contains("is it yours?"), "{stderr}");
    }
}

#[test]
fn home_that_is_read_only_can_be_looked_at() {
    if !nix::unistd::geteuid().is_root() {
        // Only root makes a file system read only.
        return;
    }
    let home = Workspace::found(Hub::shared()).founder;
    let before = home.snapshot();
    let run = |args: &[&str]| {
        let inner = home.command(args);
        let read_only = r#"mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@""#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", read_only]).arg(home.dir());
        command.arg(inner.get_program()).args(args).env("CONNECT_HOME", home.dir());
        Process::spawn("connect", command.current_dir("/")).outcome()
    };
    let Outcome { code, stdout, stderr } = run(&[]);
    assert!(code == Some(0) && stdout.contains("founder"), "{stdout}\n{stderr}");
    for args in [&["verify"][..], &["services"], &["agents"]] {
        let Outcome { code, stderr, .. } = run(args);
        assert_eq!(code, Some(0), "{args:?}: {stderr}");
    }
    assert_eq!(run(&["status"]).code, Some(9));
    let Outcome { code, stdout, stderr } = run(&["up"]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(
        stderr.contains("Read-only file system") && stderr.contains("CONNECT_HOME"),
        "{stderr}"
    );
    assert_eq!(home.snapshot(), before);
}
