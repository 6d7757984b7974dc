//! The committed vectors are what this implementation says, byte for byte.

#![expect(
    clippy::unwrap_used,
    reason = "clippy sees tests in functions that are marked as such only"
)]

use connect_spec::{
    ids::{AgentId, CredentialId, WorkspaceId},
    keys::IdentityKey,
    log::{Beat, Entry, LogEntry, Recovery},
    objects::{Genesis, SignerRole},
    signed::{Body, Signed},
    trust::{Considered, Presented, TrustState},
};
use serde_json::Value;

mod common;
#[path = "../examples/vectors/generate.rs"]
mod generate;

#[test]
fn vectors_are_up_to_date() {
    for (name, expected) in generate::files() {
        let found = std::fs::read_to_string(generate::directory().join(&name)).unwrap();
        let differs = found.lines().zip(expected.lines()).position(|(left, right)| left != right);
        assert!(
            found == expected,
            "{name} differs, first in line {}: if the protocol was meant to change, run \
             `cargo run -p connect-crypto --example vectors` and say so in PROTOCOL.md",
            differs.map_or(0, |line| line + 1)
        );
    }
}

#[test]
fn worked_session_is_up_to_date() {
    let found = std::fs::read_to_string(generate::document()).unwrap();
    assert!(
        found == generate::with_session(&found),
        "the last section of PROTOCOL.md is not what `cargo run -p connect-crypto --example vectors` writes"
    );
}

#[test]
fn every_file_beside_the_vectors_is_one() {
    let mut expected: Vec<_> = generate::files().into_iter().map(|(name, _)| name).collect();
    expected.push("README.md".to_owned());
    expected.sort();
    let mut found: Vec<_> = std::fs::read_dir(generate::directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, expected);
}

#[test]
fn most_cases_must_fail() {
    let (mut valid, mut invalid) = (0, 0);
    for (_, text) in generate::files() {
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        for case in file["cases"].as_array().unwrap() {
            match case["valid"].as_bool().unwrap() {
                true => valid += 1,
                false => {
                    assert!(!case["reason"].as_str().unwrap().is_empty());
                    invalid += 1;
                }
            }
        }
    }
    assert!(invalid >= 4 * valid, "{valid} valid, {invalid} invalid");
}

fn raw(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn id<T: for<'b> TryFrom<&'b [u8]>>(value: &Value) -> T {
    T::try_from(&raw(value)).ok().unwrap()
}

fn read<T: Body>(value: &Value) -> Signed<T> {
    Signed::decode(&raw(value)).unwrap()
}

/// What a reader of `log.json` does with one case: an error is the reason.
struct LogReader {
    start: TrustState,
}

impl LogReader {
    fn entries(wires: &Value) -> Vec<LogEntry> {
        let wires = wires.as_array().unwrap();
        wires.iter().map(|wire| LogEntry::decode(&raw(wire)).unwrap()).collect()
    }

    fn object<T: Body>(case: &Value) -> Result<(), String> {
        let signed = Signed::<T>::decode(&raw(&case["wire"])).map_err(|error| error.to_string())?;
        signed.verify_by(&id::<IdentityKey>(&case["signer"])).map_err(|error| error.to_string())?;
        if let Some(body) = case.get("body") {
            assert_eq!((signed.body(), &signed.hash()[..]), (&*raw(body), &*raw(&case["hash"])));
        }
        Ok(())
    }

    fn entry(case: &Value) -> Result<(), String> {
        let entry = LogEntry::decode(&raw(&case["entry"])).map_err(|error| error.to_string())?;
        assert_eq!(entry.hash().0[..], raw(&case["hash"]));
        assert_eq!(entry.follows().hash.0[..], raw(&case["prev"]));
        assert_eq!(entry.head().seq, case["seq"].as_u64().unwrap());
        Ok(())
    }

    /// The log of a case, with its fork.
    fn log(&self, case: &Value) -> Result<TrustState, String> {
        let entries = Self::entries(&case["entries"]);
        let mut states = vec![self.start.clone()];
        let has_more = case.get("branch").is_some() || case.get("certificate").is_some();
        for (number, entry) in (1..).zip(&entries) {
            let mut state = states.last().unwrap().clone();
            let applied = state.apply(entry);
            // Only the last entry may be one that does not hold.
            assert!(applied.is_ok() || (number == entries.len() && !has_more));
            applied.map_err(|error| error.to_string())?;
            states.push(state);
        }
        let own = states.last().unwrap();
        let Some(branch) = case.get("branch") else { return Ok(own.clone()) };
        let after = usize::try_from(case["after"].as_u64().unwrap()).unwrap();
        let considered = own
            .consider(&states[after], &entries[after], &Self::entries(branch))
            .map_err(|error| error.to_string())?;
        let (outcome, state) = match considered {
            Considered::Settled => ("settled", own.clone()),
            Considered::Forked(state) => ("forked", *state),
            Considered::Replaces(state) => ("replaces", *state),
        };
        if let Some(expected) = case.get("outcome") {
            assert_eq!(outcome, expected);
        }
        Ok(state)
    }

    fn check_state(state: &TrustState, expected: &Value) {
        let head = state.head();
        assert_eq!(
            (head.seq, &head.hash.0[..]),
            (expected["seq"].as_u64().unwrap(), &*raw(&expected["head"]))
        );
        let signers: Vec<(IdentityKey, SignerRole)> = expected["signers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|signer| {
                let owner = signer["role"] == 1;
                (id(&signer["key"]), if owner { SignerRole::Owner } else { SignerRole::Admin })
            })
            .collect();
        assert_eq!(state.signers().collect::<Vec<_>>(), signers);
        for agent in expected["revoked"].as_array().unwrap() {
            assert!(state.is_revoked(&id::<AgentId>(agent), u64::MAX));
        }
        for credential in expected["closed"].as_array().unwrap() {
            assert!(state.is_closed(&id::<CredentialId>(credential)));
        }
        assert_eq!(expected["epoch"], state.epoch());
        assert_eq!(expected["strict"], state.policy().strict);
        assert_eq!(expected["frozen"], state.is_frozen());
        assert_eq!(expected["forked"], state.is_forked());
        let (key, counter) = state.recovery();
        assert_eq!(expected["recovery_counter"], counter);
        assert_eq!(key, id(&expected["recovery_key"]));
    }

    fn peer(state: &TrustState, case: &Value) -> Result<(), String> {
        let credential = Some(&case["credential"]).filter(|credential| !credential.is_null());
        let presented = Presented {
            certificate: read(&case["certificate"]),
            credential: credential.map(read),
            noise_key: read(&case["noise_key"]),
        };
        let now = case["now"].as_u64().unwrap();
        let judged = state.verify_peer(id(&case["expected"]), presented, now);
        judged.map(|_| ()).map_err(|error| error.to_string())
    }

    fn judge(&self, case: &Value) -> Result<(), String> {
        if case.get("entry").is_some() {
            return Self::entry(case);
        }
        match case["kind"].as_str() {
            Some("entry") => return Self::object::<Entry>(case),
            Some("recovery") => return Self::object::<Recovery>(case),
            Some("beat") => return Self::object::<Beat>(case),
            other => assert_eq!(other, None),
        }
        let state = self.log(case)?;
        if let Some(expected) = case.get("state") {
            Self::check_state(&state, expected);
        }
        match case.get("certificate") {
            Some(_) => Self::peer(&state, case),
            None => Ok(()),
        }
    }
}

#[test]
fn the_log_vectors_say_what_a_reader_finds() {
    let text = std::fs::read_to_string(generate::directory().join("log.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let genesis = read::<Genesis>(&file["given"]["genesis"]);
    let anchor: WorkspaceId = id(&file["given"]["workspace_id"]);
    let reader = LogReader { start: TrustState::from_genesis(anchor, &genesis).unwrap() };
    let cases = file["cases"].as_array().unwrap();
    for case in cases {
        let expected = match case["reason"].as_str() {
            Some(reason) => Err(reason.to_owned()),
            None => Ok(()),
        };
        assert_eq!(case["valid"].as_bool(), Some(expected.is_ok()));
        assert_eq!(reader.judge(case), expected, "{}", case["name"]);
    }
    let valid = cases.iter().filter(|case| case["valid"] == true).count();
    assert!(cases.len() >= 5 * valid, "four of five must fail");
}
