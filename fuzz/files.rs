//! A home of which one file is not what the agent wrote: it is an error or of no weight, and reading it changes
//! nothing.

use std::{cell::OnceCell, fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use connect_agent::{Agent, Home, Options, was_reached};
use connect_spec::{
    bytes::Blob,
    ids::{AgentId, CredentialId, ServiceId},
    log::LogEntry,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::world::{self, NOW, World, bytes, log::Log};

/// The files that are read, by number.
const FILES: [&str; 12] = [
    "membership.json",
    "agent.key",
    "epochs.key",
    "signer.key",
    "hub-ca.pem",
    "state.json",
    "ports.json",
    "trust/genesis",
    "trust/head.json",
    "trust/log-0",
    "trust/peers.json",
    "trust/state.json",
];

/// A file as the agent writes it; `None` when it need not be there.
fn sound(world: &World, member: &world::Agent, log: &Log, file: &str) -> Option<Vec<u8>> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let json = |value: serde_json::Value| Some(value.to_string().into_bytes());
    match file {
        "membership.json" => {
            let mut membership = json!({
                "version": 1,
                "hub": "http://127.0.0.1:9",
                "label": "web server",
                "workspace_id": world.workspace,
                "salt": Blob(member.attrs.salt.to_vec()),
                "tags": member.attrs.tags,
                "noise_key_made": NOW,
            });
            let presented = serde_json::to_value(member.presented.to_blobs()).expect("plain data");
            for (name, value) in presented.as_object().expect("three fields") {
                membership[name] = value.clone();
            }
            json(membership)
        }
        "agent.key" => {
            let lines = [
                ("identity", hex(member.identity.seed().as_slice())),
                ("static-1", hex(member.static_keypair.secret().as_slice())),
                ("wrap", hex(member.wrap.seed().as_slice())),
            ];
            Some(lines.map(|(name, digits)| format!("{name} {digits}\n")).concat().into_bytes())
        }
        "epochs.key" => {
            Some(format!("epoch-0 {}\n", hex(world.epoch.to_bytes().as_slice())).into_bytes())
        }
        "signer.key" => {
            Some(format!("signer {}\n", hex(world.signer.seed().as_slice())).into_bytes())
        }
        "state.json" => json(json!({
            "exposes": [{
                "name": "prod-db",
                "target": "127.0.0.1:5432",
                "service_id": ServiceId(bytes("service")),
                "allow": ["eu"],
                "protocol": "postgres",
            }],
            "reaches": [{ "name": "cache", "port": 6379, "address": "127.0.0.2" }],
            "withdrawn": [ServiceId(bytes("gone"))],
            "record_counter": 7,
        })),
        "ports.json" => json(json!({ "prod-db": 5432, "cache": "127.0.0.2:6379" })),
        "trust/genesis" => Some(world.genesis.encode()),
        "trust/head.json" => {
            json(serde_json::to_value(log.states.last()?.head()).expect("plain data"))
        }
        "trust/log-0" => {
            let framed = |entry: &LogEntry| {
                let wire = entry.encode();
                let length = u32::try_from(wire.len()).expect("a short entry").to_be_bytes();
                [&length, wire.as_slice()].concat()
            };
            Some(log.entries.iter().flat_map(framed).collect())
        }
        "trust/peers.json" => json(json!({
            "pins": { "prod-db": member.id() },
            "noise_keys": {
                member.id().to_string(): { "counter": 1, "static_key": member.static_keypair.public() }
            },
            "guests": { CredentialId([4; 16]).to_string(): [member.id()] },
        })),
        "trust/state.json" => json(serde_json::to_value(log.states.last()?).expect("plain data")),
        _ => None,
    }
}

fn write(path: &Path, content: &[u8]) {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .expect("a directory of our own");
    file.write_all(content).expect("there is room");
}

/// A home that nothing is wrong with.
struct Sound {
    _dir: TempDir,
    home: Home,
    agent_id: AgentId,
    files: [Option<Vec<u8>>; FILES.len()],
    runtime: Runtime,
}

impl Sound {
    fn new() -> Self {
        let (world, mut log) = (World::new(), Log::new(&World::new()));
        let member = world.member("member");
        for service in 0..3 {
            let agent_id = AgentId([service; 16]);
            log.push(&world.signer, vec![world::log::revoke(agent_id)]);
        }
        // In memory where that is a directory: thousands of files are written in a second.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("connect-fuzz-").tempdir_in(dir);
        let dir = dir.expect("a directory of our own");
        fs::create_dir(dir.path().join("trust")).expect("a directory of our own");
        let files = FILES.map(|file| sound(&world, &member, &log, file));
        let home = Home::at(dir.path());
        let runtime =
            Builder::new_current_thread().enable_all().build().expect("a runtime of one thread");
        let sound = Self { _dir: dir, home, agent_id: member.id(), files, runtime };
        (0..FILES.len()).for_each(|file| sound.restore(file));
        assert_eq!(sound.start(), Some(sound.agent_id), "the home is sound");
        assert!(sound.home.load().is_ok() && was_reached(&sound.home, "prod-db"));
        sound
    }

    fn restore(&self, file: usize) {
        let path = self.home.dir().join(FILES[file]);
        match &self.files[file] {
            Some(content) => write(&path, content),
            // It may not be there.
            None => drop(fs::remove_file(path)),
        }
    }

    /// Begins to run the agent of the home, and ends that before it does anything.
    fn start(&self) -> Option<AgentId> {
        self.runtime.block_on(async {
            let lock = self.home.try_lock().ok()??;
            let agent = Agent::start(self.home.clone(), lock, Options::default()).ok()?;
            Some(agent.agent_id())
        })
    }
}

/// The first byte says which file the others are.
pub(crate) fn run(input: &[u8]) {
    thread_local! {
        static SOUND: OnceCell<Sound> = const { OnceCell::new() };
    }
    let Some((number, content)) = input.split_first() else { return };
    SOUND.with(|sound| {
        let sound = sound.get_or_init(Sound::new);
        let file = usize::from(*number) % FILES.len();
        let path = sound.home.dir().join(FILES[file]);
        write(&path, content);
        let loads = sound.home.load().is_ok();
        if let Some(agent_id) = sound.start() {
            assert!(loads, "an agent has what `load` gives");
            assert_eq!(agent_id, sound.agent_id, "no other file makes it another agent");
        }
        let _ = was_reached(&sound.home, "prod-db");
        assert!(fs::read(&path).is_ok_and(|left| left == content), "reading changes nothing");
        sound.restore(file);
    });
}

/// Each file as it is in a sound home.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let sound = Sound::new();
    let seed = |(number, content): (usize, &Option<Vec<u8>>)| {
        let name = FILES[number].rsplit('/').next().expect("a name");
        let name = if FILES[number] == "trust/state.json" { "trust-state.json" } else { name };
        let number = u8::try_from(number).expect("there are few");
        content.as_ref().map(|content| (name, [&[number], content.as_slice()].concat()))
    };
    sound.files.iter().enumerate().filter_map(seed).collect()
}
