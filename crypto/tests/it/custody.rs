//! Keys under a passphrase: only that passphrase, that workspace and those very bytes open them.

use connect_crypto::{
    custody::{Cost, CustodyError, Passphrase, SealedKey},
    keys::SigningKey,
};
use connect_spec::ids::WorkspaceId;
use zeroize::Zeroizing;

use crate::common::TestRng;

const CHEAP: Cost = Cost { memory_kib: 32, passes: 1, lanes: 1 };
const WORKSPACE: WorkspaceId = WorkspaceId([7; 32]);
const PASSPHRASE: &str = "correct horse";

fn rng() -> TestRng {
    TestRng::new("salt and nonce")
}

fn passphrase(text: &str) -> Result<Passphrase, CustodyError> {
    Passphrase::new(Zeroizing::new(text.to_owned()))
}

fn sealed(cost: Cost) -> (SigningKey, SealedKey) {
    let key = SigningKey::generate(&mut TestRng::new("key"));
    let passphrase = passphrase(PASSPHRASE).expect("long enough");
    let sealed =
        SealedKey::seal(&key, &WORKSPACE, &passphrase, cost, &mut rng()).expect("little work");
    (key, sealed)
}

fn opened(bytes: &[u8], workspace: &WorkspaceId, text: &str) -> Result<[u8; 32], CustodyError> {
    let key = SealedKey::from_bytes(bytes)?.open(workspace, &passphrase(text)?)?;
    Ok(**key.seed())
}

#[test]
fn passphrase_opens_what_it_sealed_at_any_cost() {
    for cost in [CHEAP, Cost { memory_kib: 64, passes: 2, lanes: 4 }, Cost::DEFAULT] {
        let (key, sealed) = sealed(cost);
        assert_eq!(sealed.public(), key.public());
        assert_eq!(opened(sealed.as_bytes(), &WORKSPACE, PASSPHRASE), Ok(**key.seed()));
        let seed = key.seed().as_slice();
        assert!(!sealed.as_bytes().windows(32).any(|part| part == seed));
    }
}

#[test]
fn wrong_passphrase_or_workspace_opens_nothing() {
    let (_, sealed) = sealed(CHEAP);
    for wrong in ["correct horsf", "Correct horse", "correct horse ", " correct horse"] {
        assert_eq!(opened(sealed.as_bytes(), &WORKSPACE, wrong), Err(CustodyError::Open));
    }
    let other = WorkspaceId([8; 32]);
    assert_eq!(opened(sealed.as_bytes(), &other, PASSPHRASE), Err(CustodyError::Open));
}

#[test]
fn every_byte_of_a_sealed_key_counts() {
    let (_, sealed) = sealed(CHEAP);
    let bytes = sealed.as_bytes();
    for index in 0..bytes.len() {
        // The lowest bit: a higher one of the cost asks for real work.
        let mut changed = bytes.to_vec();
        changed[index] ^= 1;
        assert!(opened(&changed, &WORKSPACE, PASSPHRASE).is_err(), "byte {index}");
    }
    for length in 0..bytes.len() {
        assert_eq!(opened(&bytes[..length], &WORKSPACE, PASSPHRASE), Err(CustodyError::Malformed));
    }
    let longer = [bytes, &[0]].concat();
    assert_eq!(opened(&longer, &WORKSPACE, PASSPHRASE), Err(CustodyError::Malformed));
}

#[test]
fn unreasonable_work_is_refused_before_it_is_done() {
    let (key, sealed) = sealed(CHEAP);
    let passphrase = passphrase(PASSPHRASE).expect("long enough");
    for cost in [
        Cost { memory_kib: 1024 * 1024 + 1, ..CHEAP },
        Cost { passes: 33, ..CHEAP },
        Cost { lanes: 17, memory_kib: 1024, ..CHEAP },
        Cost { passes: 0, ..CHEAP },
        Cost { lanes: 0, ..CHEAP },
        Cost { memory_kib: 0, ..CHEAP },
    ] {
        let refused = SealedKey::seal(&key, &WORKSPACE, &passphrase, cost, &mut rng());
        assert_eq!(refused, Err(CustodyError::Cost));
        let mut bytes = sealed.as_bytes().to_vec();
        let numbers = [cost.memory_kib, cost.passes, cost.lanes].map(u32::to_be_bytes).concat();
        bytes[33..45].copy_from_slice(&numbers);
        assert_eq!(SealedKey::from_bytes(&bytes), Err(CustodyError::Cost));
    }
}

#[test]
fn passphrases_have_a_length() {
    let length = |text: &str| passphrase(text).map(|_| ());
    assert_eq!(length("7 chars"), Err(CustodyError::TooShort));
    assert_eq!(length("8 chars!"), Ok(()));
    assert_eq!(length("äöüäöüä"), Err(CustodyError::TooShort));
    assert_eq!(length(&"x".repeat(1024)), Ok(()));
    assert_eq!(length(&"x".repeat(1025)), Err(CustodyError::TooLong));
}

#[test]
fn debug_text_shows_neither_passphrase_nor_key() {
    let text = format!("{:?}", passphrase(PASSPHRASE).expect("long enough"));
    assert_eq!(text, "Passphrase(..)");
    let (key, sealed) = sealed(CHEAP);
    let text = format!("{sealed:?}");
    assert!(text.starts_with("SealedKey { public: ") && text.ends_with(", .. }"), "{text}");
    assert!(!text.contains(&hex::encode(key.seed().as_slice())));
    assert!(!text.contains(&hex::encode(&sealed.as_bytes()[60..])));
}
