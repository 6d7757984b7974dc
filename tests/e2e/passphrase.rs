//! The signer key under a passphrase: needed to sign, and for nothing else.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use connect_tests::{
    client::Keys,
    home::{Home, Workspace},
    hub::Hub,
    process::{Outcome, Process, new_dir},
    search::Search,
    services::Service,
};

const PASSPHRASE: &str = "correct horse battery";

fn file(name: &str, content: &str) -> PathBuf {
    let path = new_dir("passphrase").join(name);
    fs::write(&path, content).expect("our own directory");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("our own names")
}

#[track_caller]
fn sealed(home: &Home, seed: &[u8]) {
    let path = home.dir().join("signer.key");
    let mode = fs::metadata(&path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let search = Search::new([seed, PASSPHRASE.as_bytes()]);
    for (path, content) in home.snapshot() {
        assert_eq!(search.bytes(&content), [""; 0], "{}", path.display());
    }
}

#[test]
fn signer_key_under_a_passphrase_signs_with_it_alone() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let seed = Keys::of(home).signer.expect("the founder signs").seed().to_vec();
    let right = file("right", &format!("{PASSPHRASE}\nanother line\n"));
    let other = file("other", "another passphrase");

    home.ok(&["trust", "passphrase", "--passphrase-file", text(&right)]);
    sealed(home, &seed);
    home.fails(&["invite"], 2, "--passphrase-file");
    home.fails(&["invite", "--passphrase-file", text(&other)], 1, "passphrase is wrong");
    home.fails(&["invite", "--passphrase-file", "/nowhere"], 2, "cannot read a passphrase");
    let code = home.ok(&["invite", "--passphrase-file", text(&right)]);
    Home::new().ok(&["join", &code]);
    let mut inviting =
        Process::spawn("connect invite", &mut home.command(&["invite", "--passphrase-file", "-"]));
    inviting.feed(format!("{PASSPHRASE}\n").as_bytes());
    let Outcome { code, stderr, .. } = inviting.outcome();
    assert_eq!(code, Some(0), "{stderr}");

    // The agent itself needs no passphrase.
    let agent = home.up();
    let service = Service::echo();
    home.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    home.ok(&["rotate"]);
    home.ok(&["services"]);
    sealed(home, &seed);
    drop(agent);

    // Another one, which needs the old one; then none.
    let change = ["trust", "passphrase", "--new-passphrase-file", text(&other)];
    home.fails(&change, 2, "--passphrase-file");
    home.fails(&[&change[..], &["--passphrase-file", text(&other)]].concat(), 1, "wrong");
    home.ok(&[&change[..], &["--passphrase-file", text(&right)]].concat());
    home.fails(&["invite", "--passphrase-file", text(&right)], 1, "wrong");
    home.ok(&["invite", "--passphrase-file", text(&other)]);
    sealed(home, &seed);
    home.fails(&["trust", "passphrase", "--remove"], 2, "--passphrase-file");
    home.ok(&["trust", "passphrase", "--remove", "--passphrase-file", text(&other)]);
    home.ok(&["invite"]);
    assert_eq!(Keys::of(home).signer.expect("as it was").seed().to_vec(), seed);
}

#[test]
fn passphrase_that_cannot_be_one_changes_nothing() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let before = home.snapshot();
    home.fails(&["trust", "passphrase"], 2, "--new-passphrase-file");
    for (content, part) in [("short", "8 characters"), ("", "8 characters"), ("\nsecond line", "8")]
    {
        let file = file("bad", content);
        home.fails(&["trust", "passphrase", "--passphrase-file", text(&file)], 2, part);
    }
    let long = file("long", &"x".repeat(5000));
    home.fails(&["trust", "passphrase", "--passphrase-file", text(&long)], 2, "1024");
    assert!(home.snapshot() == before, "the home was changed");
    let member = workspace.join("member");
    let good = file("good", PASSPHRASE);
    member.fails(&["trust", "passphrase", "--passphrase-file", text(&good)], 6, "no signer key");
}

#[test]
fn damaged_sealed_key_is_a_trust_violation() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let good = file("good", PASSPHRASE);
    home.ok(&["trust", "passphrase", "--passphrase-file", text(&good)]);
    let path = home.dir().join("signer.key");
    let content = fs::read_to_string(&path).expect("there");
    for damaged in [&content[..content.len() / 2], "sealed\n", "sealed zz\n", ""] {
        fs::write(&path, damaged).expect("our own file");
        home.fails(&["invite", "--passphrase-file", text(&good)], 7, "");
    }
    // One that is well-formed, but not what was sealed.
    let last = content.trim_end().len() - 1;
    let digit = if content.as_bytes()[last] == b'0' { "1" } else { "0" };
    fs::write(&path, format!("{}{digit}\n", &content[..last])).expect("our own file");
    home.fails(&["invite", "--passphrase-file", text(&good)], 1, "wrong");
    fs::write(&path, content).expect("our own file");
    home.ok(&["invite", "--passphrase-file", text(&good)]);
}
