use connect_crypto::{
    CryptoError,
    epoch::{EpochSecrets, NameSource},
    keys::WrapKeypair,
    names::NameKeys,
};
use connect_spec::{
    control::{EpochWrap, SealedRecord},
    ids::{AgentId, ServiceId, WorkspaceId},
    keys::WrapPublicKey,
    objects::{AgentRecord, ServiceRecord},
    signed::Signed,
};
use proptest::prelude::*;

use crate::common::{Agent, TestRng, World, bytes, secret};

fn wrapped(world: &World, to: &WrapKeypair) -> EpochWrap {
    world
        .epoch
        .wrap(&world.workspace, 5, &to.public(), &mut TestRng::new("wrap"))
        .expect("a sound key")
}

#[track_caller]
fn wrap_refused(opened: Result<EpochSecrets, CryptoError>, expected: CryptoError) {
    assert_eq!(opened.err(), Some(expected));
}

#[test]
fn a_wrap_opens_to_what_was_wrapped() {
    let world = World::new();
    let keys = WrapKeypair::from_seed(secret("wrap"));
    let wrap = wrapped(&world, &keys);
    assert_eq!(wrap.sealed.0.len(), 32 + 1088 + 80);
    let opened = EpochSecrets::open(&wrap, &world.workspace, &keys, &world.epoch.commit()).unwrap();
    assert_eq!(opened.to_bytes(), world.epoch.to_bytes());
}

#[test]
fn a_wrap_elsewhere_is_refused() {
    let world = World::new();
    let keys = WrapKeypair::from_seed(secret("wrap"));
    let wrap = wrapped(&world, &keys);
    let commit = world.epoch.commit();

    let other = WrapKeypair::from_seed(secret("other wrap"));
    let opened = EpochSecrets::open(&wrap, &world.workspace, &other, &commit);
    wrap_refused(opened, CryptoError::Open);
    let opened = EpochSecrets::open(&wrap, &WorkspaceId(bytes("other")), &keys, &commit);
    wrap_refused(opened, CryptoError::Open);
    let moved = EpochWrap { epoch: 6, sealed: wrap.sealed.clone() };
    wrap_refused(EpochSecrets::open(&moved, &world.workspace, &keys, &commit), CryptoError::Open);
    let opened = EpochSecrets::open(&wrap, &world.workspace, &keys, &bytes("other commit"));
    wrap_refused(opened, CryptoError::Misplaced);
}

#[test]
fn the_next_epoch_has_new_keys_for_names_and_the_same_realm_secret() {
    let epoch = World::new().epoch;
    let next = epoch.next(&mut TestRng::new("next"));
    assert_eq!(next.realm.as_bytes(), epoch.realm.as_bytes());
    assert_ne!(next.names.as_bytes(), epoch.names.as_bytes());
    assert_ne!(next.commit(), epoch.commit());
}

#[test]
fn half_of_a_wrap_key_is_not_enough() {
    let world = World::new();
    let keys = WrapKeypair::from_seed(secret("wrap"));
    let wrap = wrapped(&world, &keys);
    for kept in [0..32, 32..96] {
        let mut seed = secret::<96>("other wrap");
        seed[kept.clone()].copy_from_slice(&keys.seed()[kept]);
        let half = WrapKeypair::from_seed(seed);
        let opened = EpochSecrets::open(&wrap, &world.workspace, &half, &world.epoch.commit());
        wrap_refused(opened, CryptoError::Open);
    }
}

#[test]
fn a_changed_wrap_is_refused() {
    let world = World::new();
    let keys = WrapKeypair::from_seed(secret("wrap"));
    let wrap = wrapped(&world, &keys);
    let open = |blob: Vec<u8>| {
        let wrap = EpochWrap { epoch: 5, sealed: blob.into() };
        EpochSecrets::open(&wrap, &world.workspace, &keys, &world.epoch.commit())
    };
    let length = wrap.sealed.0.len();
    for position in (0..32).chain((32..1120).step_by(13)).chain(1110..length) {
        let mut blob = wrap.sealed.0.clone();
        blob[position] ^= 0x40;
        wrap_refused(open(blob), CryptoError::Open);
    }
    for length in [0, 31, 32, 1119, 1120, length - 1] {
        wrap_refused(open(wrap.sealed.0[..length].to_vec()), CryptoError::Open);
    }
    wrap_refused(open([wrap.sealed.0.as_slice(), &[0]].concat()), CryptoError::Open);
}

#[test]
fn keys_without_security_are_refused() {
    let world = World::new();
    let keys = WrapKeypair::from_seed(secret("wrap"));
    let sound = keys.public();
    let small_order = WrapPublicKey { x25519: [0; 32], ml_kem: sound.ml_kem.clone() };
    let not_canonical = WrapPublicKey { x25519: sound.x25519, ml_kem: Box::new([0xff; 1184]) };
    for key in [small_order, not_canonical] {
        let wrap = world.epoch.wrap(&world.workspace, 5, &key, &mut TestRng::new("wrap"));
        assert_eq!(wrap.err(), Some(CryptoError::Key));
    }
    let mut blob = wrapped(&world, &keys).sealed.0;
    blob[..32].fill(0);
    let wrap = EpochWrap { epoch: 5, sealed: blob.into() };
    let opened = EpochSecrets::open(&wrap, &world.workspace, &keys, &world.epoch.commit());
    wrap_refused(opened, CryptoError::Open);
}

/// A world, an exposer and its records.
struct Records {
    world: World,
    agent: Agent,
    keys: NameKeys,
}

impl Records {
    fn new() -> Self {
        let world = World::new();
        let agent = world.member("exposer");
        let keys = NameKeys::derive(&world.epoch.names);
        Self { world, agent, keys }
    }

    fn service(&self) -> Signed<ServiceRecord> {
        self.agent.identity.sign(&self.world.service_record(&self.agent))
    }

    fn sealed_service(&self) -> SealedRecord {
        self.keys.seal_service(&self.service(), &mut TestRng::new("seal")).expect("it fits")
    }

    fn open_service(&self, sealed: &SealedRecord) -> Result<Signed<ServiceRecord>, CryptoError> {
        let service = ServiceId(bytes("service"));
        self.keys.open_service(&self.world.workspace, service, self.agent.id(), sealed)
    }

    fn agent_record(&self) -> Signed<AgentRecord> {
        self.agent.identity.sign(&self.world.agent_record(&self.agent))
    }

    fn sealed_agent(&self) -> SealedRecord {
        self.keys.seal_agent(&self.agent_record(), &mut TestRng::new("seal")).expect("it fits")
    }

    fn open_agent(&self, sealed: &SealedRecord) -> Result<Signed<AgentRecord>, CryptoError> {
        let identity = self.agent.identity.public();
        self.keys.open_agent(&self.world.workspace, self.agent.id(), &identity, sealed)
    }
}

#[test]
fn records_open_where_they_belong() {
    let records = Records::new();
    assert_eq!(records.open_service(&records.sealed_service()).unwrap(), records.service());
    assert_eq!(records.open_agent(&records.sealed_agent()).unwrap(), records.agent_record());
}

#[test]
fn records_have_few_lengths() {
    let records = Records::new();
    let length = |sealed: SealedRecord| sealed.sealed.0.len() - 24 - 16;
    assert_eq!(length(records.sealed_agent()), 256);
    assert_eq!(length(records.sealed_service()), 1024);
    let mut long = records.world.agent_record(&records.agent);
    long.label = "l".repeat(64).parse().unwrap();
    let long = records.agent.identity.sign(&long);
    let sealed = records.keys.seal_agent(&long, &mut TestRng::new("seal")).unwrap();
    assert_eq!(length(sealed), 512);
}

#[test]
fn a_moved_record_is_refused() {
    let records = Records::new();
    let (workspace, service, agent) =
        (records.world.workspace, ServiceId(bytes("service")), records.agent.id());
    let sealed = records.sealed_service();
    let mut moved = [sealed.clone(), sealed.clone()];
    moved[0].epoch += 1;
    moved[1].counter += 1;
    for sealed in &moved {
        assert_eq!(records.open_service(sealed).err(), Some(CryptoError::Open));
    }
    let keys = &records.keys;
    let elsewhere = [
        keys.open_service(&WorkspaceId(bytes("other")), service, agent, &sealed),
        keys.open_service(&workspace, ServiceId(bytes("other")), agent, &sealed),
        keys.open_service(&workspace, service, AgentId(bytes("other")), &sealed),
        // Another epoch has other keys.
        NameKeys::derive(&NameSource::from_bytes(secret("next epoch")))
            .open_service(&workspace, service, agent, &sealed),
    ];
    for opened in elsewhere {
        assert_eq!(opened.err(), Some(CryptoError::Open));
    }
    // The record of an agent is none of a service, even at the same ids.
    let own = keys.open_service(&workspace, ServiceId(agent.0), agent, &records.sealed_agent());
    assert!(matches!(own.err(), Some(CryptoError::Object(_))));

    let sealed = records.sealed_agent();
    let identity = records.agent.identity.public();
    let other = records.world.member("other");
    let elsewhere = [
        keys.open_agent(&WorkspaceId(bytes("other")), agent, &identity, &sealed),
        keys.open_agent(&workspace, other.id(), &other.identity.public(), &sealed),
    ];
    for opened in elsewhere {
        assert_eq!(opened.err(), Some(CryptoError::Open));
    }
    let opened = keys.open_agent(&workspace, agent, &other.identity.public(), &sealed);
    assert_eq!(opened.err(), Some(CryptoError::Misplaced));
}

/// A member holds the name key, so its own signature is all that it can bring.
#[test]
fn a_record_by_another_member_is_refused() {
    let records = Records::new();
    let thief = records.world.member("thief");
    let rng = &mut TestRng::new("seal");

    // The victim's ids and certificate, signed by the thief.
    let forged = thief.identity.sign(&records.world.service_record(&records.agent));
    let sealed = records.keys.seal_service(&forged, rng).unwrap();
    assert_eq!(records.open_service(&sealed).err(), Some(CryptoError::Misplaced));

    // The victim's ids, the thief's own certificate.
    let mut record = records.world.service_record(&records.agent);
    record.certificate = thief.presented.certificate.clone();
    let sealed = records.keys.seal_service(&thief.identity.sign(&record), rng).unwrap();
    assert_eq!(records.open_service(&sealed).err(), Some(CryptoError::Misplaced));

    let forged = thief.identity.sign(&records.world.agent_record(&records.agent));
    let sealed = records.keys.seal_agent(&forged, rng).unwrap();
    assert_eq!(records.open_agent(&sealed).err(), Some(CryptoError::Misplaced));
}

#[test]
fn a_changed_record_is_refused() {
    let records = Records::new();
    let sealed = records.sealed_service();
    for position in 0..sealed.sealed.0.len() {
        let mut changed = sealed.clone();
        changed.sealed.0[position] ^= 2;
        assert_eq!(records.open_service(&changed).err(), Some(CryptoError::Open));
    }
    for length in [0, 23, 24, 39, 40, sealed.sealed.0.len() - 1] {
        let mut changed = sealed.clone();
        changed.sealed.0.truncate(length);
        assert_eq!(records.open_service(&changed).err(), Some(CryptoError::Open));
    }
    let mut longer = sealed.clone();
    longer.sealed.0.push(0);
    assert_eq!(records.open_service(&longer).err(), Some(CryptoError::Open));
    longer.sealed.0.resize(10_000, 0);
    assert_eq!(records.open_service(&longer).err(), Some(CryptoError::Open));
}

#[test]
fn tags_differ_by_name_and_by_epoch_only() {
    let keys = |label| NameKeys::derive(&NameSource::from_bytes(secret(label)));
    let name = |text: &str| text.parse().unwrap();
    let tag = keys("epoch 0").tag(&name("prod-db"));
    assert_eq!(keys("epoch 0").tag(&name("PROD-db")), tag);
    assert_ne!(keys("epoch 0").tag(&name("prod-dc")), tag);
    assert_ne!(keys("epoch 1").tag(&name("prod-db")), tag);
}

proptest! {
    #[test]
    fn opening_anything_never_panics(blob in proptest::collection::vec(any::<u8>(), 0..1300), epoch in any::<u32>()) {
        let records = Records::new();
        let sealed = SealedRecord { epoch, counter: 1, sealed: blob.clone().into() };
        prop_assert!(records.open_service(&sealed).is_err());
        prop_assert!(records.open_agent(&sealed).is_err());
        let wrap = EpochWrap { epoch, sealed: blob.into() };
        prop_assert!(EpochSecrets::open(&wrap, &records.world.workspace, &records.agent.wrap, &[0; 32]).is_err());
    }
}
