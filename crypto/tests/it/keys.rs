use connect_crypto::{
    epoch::{EpochSecrets, NameSource, RealmSecret},
    founding::Founding,
    invite::{InviteKeys, InviteSeed},
    keys::{RecoveryKey, SigningKey, StaticKeypair, WordsError, WrapKeypair},
    names::NameKeys,
};
use connect_spec::{
    ids::{ServiceId, WorkspaceId},
    objects::AgentRecord,
    signed::{Body, ObjectError, Signed},
    trust::TrustState,
};

use crate::common::{TestRng, World, bytes, secret};

#[test]
fn nothing_secret_prints() {
    let rng = &mut TestRng::new("debug");
    let founding = Founding::create(rng);
    let invite = World::new().invite("https://hub.example:7420");
    let printed = [
        format!("{:?}", SigningKey::generate(rng)),
        format!("{:?}", StaticKeypair::generate(rng)),
        format!("{:?}", WrapKeypair::generate(rng)),
        format!("{:?}", RecoveryKey::generate(rng)),
        format!("{:?}", RealmSecret::generate(rng)),
        format!("{:?}", NameSource::generate(rng)),
        format!("{:?}", EpochSecrets::generate(rng)),
        format!("{:?}", NameKeys::derive(&founding.epoch.names)),
        format!("{:?}", InviteSeed::generate(rng)),
        format!("{:?}", InviteKeys::derive(&invite.seed)),
    ];
    let expected = [
        "SigningKey(..)",
        "StaticKeypair(..)",
        "WrapKeypair(..)",
        "RecoveryKey(..)",
        "RealmSecret(..)",
        "NameSource(..)",
        "EpochSecrets(..)",
        "NameKeys(..)",
        "InviteSeed(..)",
        "InviteKeys(..)",
    ];
    assert_eq!(printed, expected);

    let printed = format!("{invite:?}");
    assert!(printed.contains("seed: InviteSeed(..)") && !printed.contains("pc1"), "{printed}");
    let printed = format!("{founding:?}");
    assert!(
        printed.ends_with(
            "signer: SigningKey(..), recovery: RecoveryKey(..), epoch: EpochSecrets(..) }"
        ),
        "{printed}"
    );
}

#[test]
fn keys_come_back_from_custody() {
    let rng = &mut TestRng::new("custody");
    let signing = SigningKey::generate(rng);
    assert_eq!(SigningKey::from_seed(signing.seed().clone()).public(), signing.public());
    let keys = StaticKeypair::generate(rng);
    assert_eq!(StaticKeypair::from_secret(keys.secret().clone()).public(), keys.public());
    let wrap = WrapKeypair::generate(rng);
    assert_eq!(WrapKeypair::from_seed(wrap.seed().clone()).public(), wrap.public());
    let epoch = EpochSecrets::generate(rng);
    assert_eq!(EpochSecrets::from_bytes(epoch.to_bytes()).commit(), epoch.commit());
    assert_ne!(epoch.realm.as_bytes(), epoch.names.as_bytes());
}

#[test]
fn signatures_are_for_one_kind_and_one_body() {
    let key = SigningKey::from_seed(secret("signer"));
    let signature = key.sign_text("login", b"body");
    assert!(key.public().verify("login", b"body", &signature).is_ok());
    assert!(key.public().verify("logout", b"body", &signature).is_err());
    assert!(key.public().verify("login", b"Body", &signature).is_err());
    let other = SigningKey::from_seed(secret("other"));
    assert!(other.public().verify("login", b"body", &signature).is_err());
}

#[test]
fn the_signatures_of_an_object_have_one_order_and_each_signer_signs_once() {
    let world = World::new();
    let agent = world.member("agent");
    let body = world.agent_record(&agent).encode();
    let sign = |key: &SigningKey| (key.public(), key.sign_text(AgentRecord::KIND, &body));
    let (one, two) = (sign(&agent.identity), sign(&world.signer));
    let object = |signatures: &[_]| Signed::<AgentRecord>::new(body.clone(), signatures.to_vec());
    let sound = object(&[one, two]).unwrap();
    assert_eq!(object(&[two, one]).unwrap(), sound);
    assert_eq!(object(&[one, one]).err(), Some(ObjectError::Envelope));
    assert_eq!(object(&[]).err(), Some(ObjectError::Envelope));

    let wire = sound.encode();
    assert_eq!(Signed::<AgentRecord>::decode(&wire).unwrap(), sound);
    // `[bstr 32, bstr 64]` each, at the end.
    let (rest, second) = wire.split_last_chunk::<101>().unwrap();
    let (head, first) = rest.split_last_chunk::<101>().unwrap();
    for [one, two] in [[second, first], [first, first], [second, second]] {
        let wire = [head, one.as_slice(), two.as_slice()].concat();
        assert_eq!(Signed::<AgentRecord>::decode(&wire).err(), Some(ObjectError::Envelope));
    }
}

#[test]
fn an_object_that_no_reader_accepts_is_not_signed() {
    let world = World::new();
    let agent = world.member("agent");
    let mut record = world.service_record(&agent);
    record.protocol = "not a protocol".to_owned();
    assert_eq!(agent.identity.try_sign(&record).err(), Some(ObjectError::Value(7)));

    let mut certificate = world.certificate(&agent.identity, &agent.attrs);
    certificate.services = Some(vec![ServiceId([0; 16]); 65]);
    assert!(world.signer.try_sign(&certificate).is_err());
}

#[test]
fn a_founded_workspace_verifies_from_its_id_alone() {
    let founding = Founding::create(&mut TestRng::new("founding"));
    let anchor = WorkspaceId(founding.genesis.hash());
    let genesis = Signed::decode(&founding.genesis.encode()).unwrap();
    let trust = TrustState::from_genesis(anchor, &genesis).unwrap();
    assert!(trust.is_signer(&founding.signer.public()));
    assert_eq!(trust.epoch_commit(0), Some(&founding.epoch.commit()));
    assert_eq!(genesis.object().recovery_key, founding.recovery.public());

    let other = Founding::create(&mut TestRng::new("other founding"));
    assert!(TrustState::from_genesis(anchor, &other.genesis).is_err());
}

#[test]
fn recovery_words_come_back() {
    let key = RecoveryKey::generate(&mut TestRng::new("recovery"));
    let words = key.words();
    assert_eq!(words.split(' ').count(), 24);
    assert_eq!(RecoveryKey::from_words(&words).unwrap().public(), key.public());
    let as_typed = format!("  {}\n", words.to_uppercase().replace(' ', "  "));
    assert_eq!(RecoveryKey::from_words(&as_typed).unwrap().public(), key.public());
}

/// The words of 32 zero bytes, from BIP-39's own vectors.
#[test]
fn recovery_words_are_those_of_bip_39() {
    let words = [vec!["abandon"; 23], vec!["art"]].concat().join(" ");
    let key = RecoveryKey::from_words(&words).unwrap();
    assert_eq!(key.public(), SigningKey::from_seed([0; 32].into()).public());
    assert_eq!(*key.words(), words);
}

#[test]
fn recovery_words_with_a_mistake_are_refused() {
    #[track_caller]
    fn check(words: &[&str], expected: WordsError) {
        assert_eq!(RecoveryKey::from_words(&words.join(" ")).err(), Some(expected));
    }
    let sound = [vec!["abandon"; 23], vec!["art"]].concat();
    check(&[], WordsError::Count(0));
    check(&sound[..23], WordsError::Count(23));
    check(&[sound.as_slice(), &["art"]].concat(), WordsError::Count(25));
    // 12 words are sound BIP-39, but too few bits.
    check(&[vec!["abandon"; 11], vec!["about"]].concat(), WordsError::Count(12));
    let mut unknown = sound.clone();
    unknown[4] = "abandom";
    check(&unknown, WordsError::Unknown(5));
    let mut wrong = sound.clone();
    wrong[4] = "ability";
    check(&wrong, WordsError::Checksum);
    let mut swapped = sound.clone();
    swapped.swap(0, 23);
    check(&swapped, WordsError::Checksum);
}

#[test]
fn invite_keys_follow_from_the_seed_and_differ() {
    let derive = |label| InviteKeys::derive(&InviteSeed::from_bytes(secret(label)));
    let (keys, again, other) = (derive("seed"), derive("seed"), derive("other seed"));
    assert_eq!(keys.signing.public(), again.signing.public());
    assert_eq!(keys.wrap.public(), again.wrap.public());
    assert_ne!(keys.signing.public(), other.signing.public());
    assert_ne!(keys.wrap.public().hash(), other.wrap.public().hash());
    assert_ne!(keys.signing.seed().as_slice(), bytes::<32>("seed"));
}

/// Drivers hand each direction, and each step, to a task of its own.
#[test]
fn states_can_move_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<connect_crypto::handshake::AwaitReply>();
    check::<connect_crypto::handshake::Reply>();
    check::<connect_crypto::handshake::Received>();
    check::<connect_crypto::transport::Transport>();
    check::<connect_crypto::transport::Sealer>();
    check::<connect_crypto::transport::Opener>();
    check::<SigningKey>();
    check::<EpochSecrets>();
    check::<NameKeys>();
}
