//! Where secrets may not show: other users' eyes, arguments, logs, Debug texts.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use connect_tests::{
    eventually,
    home::{Home, Workspace},
    hub::Hub,
    process::new_dir,
    search::{Search, family},
    services::Service,
};

/// Everything in a home that must stay there, as bytes.
fn secrets_of(home: &Home) -> Vec<Vec<u8>> {
    ["agent.key", "epochs.key", "signer.key"]
        .iter()
        .filter_map(|name| fs::read_to_string(home.dir().join(name)).ok())
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .map(|line| line.split_once(' ').map(|(_, hex)| hex.to_owned()).expect("name and hex"))
        .map(|digits| hex::decode(digits).expect("hex"))
        .collect()
}

#[test]
fn home_is_private_whatever_the_umask() {
    let workspace = Workspace::found(Hub::shared());
    let home = Home::new();
    let code = workspace.founder.ok(&["invite"]);
    let joined = std::process::Command::new("sh")
        .args(["-c", "umask 000; exec \"$@\"", "sh"])
        .arg(connect_tests::process::program("connect"))
        .args(["join", &code])
        .env("CONNECT_HOME", home.dir())
        .output()
        .expect("there is a shell");
    assert!(joined.status.success());
    let _agent = home.up();
    let service = Service::echo();
    home.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    home.reach("svc");
    for home in [&workspace.founder, &home] {
        let mut dirs = vec![home.dir().to_owned()];
        let mut secret_files = 0;
        while let Some(dir) = dirs.pop() {
            let mode = fs::metadata(&dir).expect("ours").permissions().mode() & 0o777;
            assert_eq!(mode, 0o700, "{}", dir.display());
            for entry in fs::read_dir(&dir).expect("ours").flatten() {
                let metadata = entry.metadata().expect("ours");
                if metadata.is_dir() {
                    dirs.push(entry.path());
                } else if metadata.is_file() {
                    assert_eq!(metadata.mode() & 0o777, 0o600, "{}", entry.path().display());
                    secret_files += 1;
                }
            }
        }
        assert!(secret_files >= 4);
    }
}

#[test]
fn secrets_are_in_their_files_and_nowhere_else() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let secrets = secrets_of(home);
    assert!(secrets.len() >= 5, "identity, static key, wrap key, epoch, signer");
    let search = Search::new(secrets.iter().map(Vec::as_slice));
    for (path, content) in home.snapshot() {
        let hits = search.bytes(&content);
        let is_key_file = path.extension().is_some_and(|extension| extension == "key");
        assert_eq!(!hits.is_empty(), is_key_file, "{}: {hits:?}", path.display());
    }
    // Not in what the commands and the agent say, at their most talkative.
    let agent = home.up();
    let mut said = agent.stderr();
    for command in [&["status"][..], &["services"], &["agents"], &["--json", "status"]] {
        let outcome = connect_tests::process::Process::spawn(
            "connect",
            home.command(command).env("CONNECT_LOG", "trace"),
        )
        .outcome();
        said.push_str(&outcome.stdout);
        said.push_str(&outcome.stderr);
    }
    assert_eq!(search.bytes(said.as_bytes()), [""; 0]);
    assert_eq!(search.bytes(Hub::shared().log().as_bytes()), [""; 0]);
}

#[test]
fn invite_and_words_are_shown_once_and_kept_nowhere() {
    let hub = Hub::start(&[]);
    let home = Home::new();
    let founded = home.json(&["init", "--hub", hub.url()]);
    let words = founded["recovery_words"].as_str().expect("words").to_owned();
    assert_eq!(words.split(' ').count(), 24);
    let invite = founded["invite"].as_str().expect("a code").to_owned();
    let joined = Home::new();
    joined.ok(&["join", &invite]);
    let three: Vec<_> = words.split(' ').take(3).collect();
    let three = three.join(" ");
    let search = Search::new([three.as_bytes(), &invite.as_bytes()[20..]]);
    for home in [&home, &joined] {
        for (path, content) in home.snapshot() {
            assert_eq!(search.bytes(&content), [""; 0], "{}", path.display());
        }
    }
    assert_eq!(search.bytes(hub.log().as_bytes()), [""; 0]);
    assert_eq!(search.dir(hub.data_dir()).0, [""; 0]);
}

#[test]
fn key_file_that_others_can_read_is_refused() {
    let home = Workspace::found(Hub::shared()).founder;
    let key = home.dir().join("agent.key");
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).expect("ours");
        home.fails(&["services"], 7, "chmod 600");
        home.fails(&["up"], 7, "chmod 600");
    }
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("ours");
    home.ok(&["services"]);
}

#[test]
fn damaged_home_is_a_trust_violation_and_left_as_it_is() {
    let workspace = Workspace::found(Hub::shared());
    let damage = |file: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let copy = Home::at(new_dir("damaged").join("home"));
        let copied = std::process::Command::new("cp")
            .arg("-a")
            .arg(workspace.founder.dir())
            .arg(copy.dir())
            .status();
        assert!(copied.expect("there is cp").success());
        let path = copy.dir().join(file);
        let mut content = fs::read(&path).expect("ours");
        change(&mut content);
        fs::write(&path, &content).expect("ours");
        copy.fails(&["services"], 7, "");
        copy.fails(&["up"], 7, "");
        assert!(fs::read(&path).expect("ours") == content, "{file} was changed");
    };
    let cut = |content: &mut Vec<u8>| content.truncate(content.len() / 2);
    for file in ["agent.key", "membership.json", "trust/genesis", "trust/head.json"] {
        damage(file, &cut);
        damage(file, &|content| content.clear());
    }
    // Another identity's key under this membership, and another genesis under this id.
    damage("agent.key", &|content| {
        let digit = &mut content[12];
        *digit = if *digit == b'0' { b'1' } else { b'0' };
    });
    damage("trust/genesis", &|content| {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    });
}

/// The arguments and environment of a process, as others of the same user see them.
fn visible(id: u32) -> Vec<u8> {
    let read = |name: &str| fs::read(Path::new("/proc").join(id.to_string()).join(name));
    [read("cmdline").unwrap_or_default(), read("environ").unwrap_or_default()].concat()
}

#[test]
fn arguments_of_children_hold_no_secret() {
    let hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let home = &workspace.founder;
    home.ok(&["up", "--detach"]);
    let log = home.dir().join("agent.log");
    eventually("it is connected", || {
        fs::read_to_string(&log).is_ok_and(|log| log.contains("connected"))
    });
    let secrets = secrets_of(home);
    let search = Search::new(secrets.iter().map(Vec::as_slice));
    let ours = home.dir().as_os_str().as_encoded_bytes().to_vec();
    let agents: Vec<u32> = fs::read_dir("/proc")
        .expect("Linux")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|id| visible(*id).windows(ours.len()).any(|part| part == ours))
        .collect();
    assert_eq!(agents.len(), 1, "the agent that runs in the background");
    for id in agents.into_iter().chain(family(hub.id())) {
        assert_eq!(search.bytes(&visible(id)), [""; 0]);
    }
    home.ok(&["down"]);
}

#[test]
fn debug_text_of_an_identity_shows_no_secret() {
    let workspace = Workspace::found(Hub::shared());
    let home = &workspace.founder;
    let identity = connect_agent::Home::at(home.dir()).load().expect("enrolled");
    let text = format!("{identity:?} {identity:#?}");
    assert!(text.contains(&identity.agent_id().to_string()));
    let secrets = secrets_of(home);
    let search = Search::new(secrets.iter().map(Vec::as_slice));
    assert_eq!(search.bytes(text.as_bytes()), [""; 0]);
    // Bytes as `[1, 2, 3]`, as a derived Debug would print them.
    for secret in &secrets {
        let listed = format!("{:?}", &secret[..8]);
        assert!(!text.contains(listed.trim_matches(['[', ']'])));
    }
    let keys = connect_tests::client::Keys::of(home);
    assert_eq!(search.bytes(format!("{keys:?}").as_bytes()), [""; 0]);
}
