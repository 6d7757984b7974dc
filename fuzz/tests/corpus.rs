//! The corpus and what is near it, on stable.

use std::{fs, path::Path};

use connect_fuzz::{TARGETS, Target, channel_machine, hub_router, trust_log};
use proptest::prelude::*;

/// Targets that agree on keys or write files, so that an input takes a thousand times as long as with a parser.
const SLOW: [&str; 3] = ["agent_files", "handshake_reader", "record_open"];
/// How many inputs near its corpus a target is tried with at most, so that all of them take seconds.
const TRIES: usize = 30_000;
/// The same of a slow one.
const SLOW_TRIES: usize = 400;
/// What is done to a byte.
const BENDS: [u8; 4] = [0x01, 0x20, 0x80, 0xff];

fn is_slow(target: &str) -> bool {
    SLOW.contains(&target)
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(directory)
        .expect("a corpus")
        .map(|file| file.expect("a file").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "`{target}` has no corpus");
    files.into_iter().map(|file| fs::read(file).expect("a file")).collect()
}

fn quick() -> impl Iterator<Item = Target> {
    TARGETS.into_iter().filter(|(name, _)| !is_slow(name)).map(|(_, target)| target)
}

#[test]
fn the_corpus_breaks_no_promise() {
    for (name, target) in TARGETS {
        corpus(name).iter().for_each(|input| target(input));
    }
}

#[test]
fn the_corpus_cut_or_bent_breaks_no_promise() {
    for (name, target) in TARGETS {
        let seeds = corpus(name);
        let bytes: usize = seeds.iter().map(Vec::len).sum();
        // Every byte, or as many of them as there is time for.
        let tries = if is_slow(name) { SLOW_TRIES } else { TRIES };
        let stride = (bytes * (BENDS.len() + 1)).div_ceil(tries);
        for seed in seeds {
            for at in (0..seed.len()).step_by(stride) {
                target(&seed[..at]);
                for bend in BENDS {
                    let mut bent = seed.clone();
                    bent[at] ^= bend;
                    target(&bent);
                }
            }
        }
    }
}

#[test]
fn no_input_of_two_bytes_breaks_a_promise() {
    TARGETS.iter().for_each(|(_, target)| target(&[]));
    for target in quick() {
        for pair in 0..=u16::MAX {
            target(&pair.to_be_bytes()[1..]);
            target(&pair.to_be_bytes());
        }
    }
}

proptest! {
    #[test]
    fn no_sequence_of_steps_breaks_a_promise(
        input in proptest::collection::vec(any::<u8>(), 16..300),
    ) {
        trust_log(&input[..input.len().min(100)]);
        channel_machine(&input);
        hub_router(&input);
    }

    #[test]
    fn no_short_input_breaks_a_promise(input in proptest::collection::vec(any::<u8>(), 0..64)) {
        quick().for_each(|target| target(&input));
    }
}
