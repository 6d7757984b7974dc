//! Vectors of an insider: messages and records that open, since whoever made them holds every key, and must be
//! refused all the same.

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305,
    aead::{Aead as _, Payload as Sealing},
};
use connect_crypto::{keys::StaticKeypair, names::NameKeys};
use connect_spec::{
    cbor::FieldsWriter,
    control::SealedRecord,
    ids::ServiceId,
    limits::HANDSHAKE_PADDING,
    objects::{Attributes, NoiseKey},
    prologue::Prologue,
    trust::Presented,
};
use serde_json::json;

use super::{File, Pair, hex, kdf, with_field};
use crate::common::{Agent, NOW, TestRng, World, bytes, secret};

#[path = "../../tests/common/noise.rs"]
mod noise;

use noise::{Shared, Symmetric, after_static_keys, answer, dh, public};

/// What a side says of itself.
#[derive(Clone)]
struct Said {
    presented: Presented,
    attrs: Attributes,
    /// An encapsulation key, or what is in its place.
    key: Option<Vec<u8>>,
    /// A field that is left out.
    without: u64,
}

impl Said {
    fn by(agent: &Agent, key: Option<&[u8]>) -> Self {
        let (presented, attrs) = (agent.presented.clone(), agent.attrs.clone());
        Self { presented, attrs, key: key.map(<[u8]>::to_vec), without: 0 }
    }

    fn map(&self, world: &World) -> Vec<u8> {
        let head = world.head();
        let with = |key| (key != self.without).then_some(());
        let attrs = || {
            let tags = self.attrs.tags.iter().map(String::as_str);
            FieldsWriter::new().bytes(0, &self.attrs.salt).texts(1, tags)
        };
        FieldsWriter::new()
            .optional(with(1), |map, ()| map.bytes(1, &self.presented.certificate.encode()))
            .optional(with(3), |map, ()| map.bytes(3, &self.presented.noise_key.encode()))
            .optional(with(4), |map, ()| map.map(4, attrs()))
            .optional(with(5), |map, ()| map.uint(5, head.seq))
            .optional(with(6), |map, ()| map.bytes(6, &head.hash.0))
            .optional(self.key.as_ref(), |map, key| map.bytes(7, key))
            .finish()
    }
}

/// A payload around a map, with the padding that it must have.
fn padded(map: &[u8]) -> Vec<u8> {
    let mut payload = with_length(map.len(), map);
    payload.resize(payload.len().next_multiple_of(HANDSHAKE_PADDING), 0);
    payload
}

fn with_length(length: usize, map: &[u8]) -> Vec<u8> {
    [&u16::try_from(length).expect("it is short").to_be_bytes(), map].concat()
}

/// Payloads that are refused in either message. `key` is what this message must carry.
fn payloads(pair: &Pair, agent: &Agent, key: Option<&[u8]>) -> Vec<(&'static str, Vec<u8>)> {
    let (world, sound) = (&pair.world, Said::by(agent, key));
    let other = world.member("other");
    let said = |said: Said| padded(&said.map(world));
    let change = |change: &dyn Fn(&mut Said)| {
        let mut changed = sound.clone();
        change(&mut changed);
        said(changed)
    };
    let map = sound.map(world);
    let payload = padded(&map);
    let more = |bytes: usize| [payload.as_slice(), &vec![0; bytes]].concat();
    let mut dirty = payload.clone();
    *dirty.last_mut().expect("it is padded") = 1;
    let of_another_key = NoiseKey {
        static_key: StaticKeypair::from_secret(secret("other static")).public(),
        ..agent.presented.noise_key.object().clone()
    };
    let of_another_key = agent.identity.sign(&of_another_key);
    let tags = |tags: &[&str]| tags.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>();
    vec![
        ("nothing", Vec::new()),
        ("a length and nothing", with_length(0, &[])),
        ("no padding", with_length(map.len(), &map)),
        ("padding that is not zero", dirty),
        ("a byte of padding more", more(1)),
        ("a block of padding more", more(HANDSHAKE_PADDING)),
        ("a length beyond the end", {
            let mut long = with_length(payload.len() - 1, &map);
            long.resize(payload.len(), 0);
            long
        }),
        ("a byte after the map", padded(&[map.as_slice(), &[0]].concat())),
        ("a map that is cut", padded(&map[..map.len() - 1])),
        ("a field twice", padded(&with_field(&map, &[0x06, 0x40]))),
        ("parameters", padded(&with_field(&map, &[0x08, 0xa0]))),
        ("no certificate", change(&|said| said.without = 1)),
        ("no NoiseKey", change(&|said| said.without = 3)),
        ("no tags", change(&|said| said.without = 4)),
        ("no number of a head", change(&|said| said.without = 5)),
        ("no hash of a head", change(&|said| said.without = 6)),
        ("another salt", change(&|said| said.attrs.salt = bytes("other"))),
        ("another tag", change(&|said| said.attrs.tags = tags(&["eu-west", "test"]))),
        ("tags out of order", change(&|said| said.attrs.tags.reverse())),
        ("a tag twice", change(&|said| said.attrs.tags = tags(&["prod", "prod"]))),
        ("another member's objects", change(&|said| said.presented = other.presented.clone())),
        ("another member's certificate", {
            let certificate = other.presented.certificate.clone();
            change(&|said| said.presented.certificate = certificate.clone())
        }),
        ("another member's NoiseKey", {
            let noise_key = other.presented.noise_key.clone();
            change(&|said| said.presented.noise_key = noise_key.clone())
        }),
        ("a NoiseKey for another static key", {
            change(&|said| said.presented.noise_key = of_another_key.clone())
        }),
    ]
}

/// Adds the cases of both messages: `kem_seed` and `psk` are those of the valid case, of which `message2` is,
/// and `answering` the responder's ephemeral secret.
pub(super) fn handshake(
    file: &mut File,
    pair: &Pair,
    kem_seed: &[u8],
    psk: &[u8; 32],
    [beginning, answering]: [&[u8]; 2],
    message2: &[u8],
) {
    use ml_kem::KeyExport as _;
    let seed = ml_kem::Seed::try_from(kem_seed).expect("64 bytes");
    let key = ml_kem::ml_kem_768::DecapsulationKey::from_seed(seed).encapsulation_key().to_bytes();
    let key = key.as_slice();
    let [beginning, answering] =
        [beginning, answering].map(|secret| <&[u8; 32]>::try_from(secret).expect("32 bytes"));
    let initiator: &[u8; 32] = pair.initiator.static_keypair.secret();
    let responder = pair.responder.static_keypair.public();
    let responder = responder.as_bytes();
    let ephemeral = Shared::of(beginning, responder);
    let of_initiator = Shared::of(initiator, responder);
    let nothing = Shared { public: [0; 32], secret: [0; 32] };
    let begin = |ephemeral: &Shared, initiator: &Shared| {
        after_static_keys(&pair.prologue.encode(), responder, ephemeral, initiator)
    };
    let sound = padded(&Said::by(&pair.initiator, Some(key)).map(&pair.world));

    let read = |message: &[u8]| -> Result<(), String> {
        let received = pair.receive(&pair.prologue, message).map_err(|error| error.to_string())?;
        let presented = received.payload().presented.clone();
        let peer = pair.world.trust.verify_peer(pair.initiator.id(), presented, NOW);
        let peer = peer.map_err(|error| error.to_string())?;
        let local = pair.local(&pair.responder);
        let answered = received.answer(&peer, &local, &mut TestRng::new("responder"));
        answered.map(|_| ()).map_err(|error| error.to_string())
    };
    let seal1 = |(mut sent, mut state): (Vec<u8>, Symmetric), payload: &[u8]| {
        sent.extend(state.encrypt_and_hash(payload));
        sent
    };
    let made = seal1(begin(&ephemeral, &of_initiator), &sound);
    read(&made).expect("this implementation makes what the other one reads");
    let mut first = |name: &str, message: Vec<u8>| {
        let case = json!({ "message": 1, "replaced_by": hex(&message) });
        file.invalid(&format!("message 1 by a member: {name}"), read(&message), case);
    };
    for (name, payload) in payloads(pair, &pair.initiator, Some(key)) {
        first(name, seal1(begin(&ephemeral, &of_initiator), &payload));
    }
    let with_key = |key: Option<&[u8]>| {
        let payload = padded(&Said::by(&pair.initiator, key).map(&pair.world));
        seal1(begin(&ephemeral, &of_initiator), &payload)
    };
    first("no ML-KEM key", with_key(None));
    first("an ML-KEM key that is cut", with_key(Some(&key[1..])));
    first("an ML-KEM key that is longer", with_key(Some(&[key, &[0]].concat())));
    // The first number is the modulus.
    first(
        "an ML-KEM key with 3,329",
        with_key(Some(&[&[0x01, key[1] & 0xf0 | 0x0d], &key[2..]].concat())),
    );
    first("an ML-KEM key of ones", with_key(Some(&[0xff; 1184])));
    first("an ephemeral key of zeros", seal1(begin(&nothing, &of_initiator), &sound));
    first("a static key of zeros", seal1(begin(&ephemeral, &nothing), &sound));

    let read = |message: &[u8]| -> Result<(), String> {
        let (state, _) = pair.initiate(&mut TestRng::new("initiator"));
        let reply = state.read(message).map_err(|error| error.to_string())?;
        let presented = reply.payload().presented.clone();
        let peer = pair.world.trust.verify_peer(pair.responder.id(), presented, NOW);
        let peer = peer.map_err(|error| error.to_string())?;
        reply.confirm(&peer).map(|_| ()).map_err(|error| error.to_string())
    };
    let (ciphertext, _) = message2.split_at(1088);
    let begun = ephemeral;
    let seal2 = |ephemeral: &[u8; 32], shared: [&[u8; 32]; 2], payload: &[u8]| {
        let (_, mut state) = begin(&begun, &of_initiator);
        state.encrypt_and_hash(&sound);
        answer(&mut state, ephemeral, shared, psk);
        [ciphertext, ephemeral, &state.encrypt_and_hash(payload)].concat()
    };
    let shared = [dh(answering, &public(beginning)), dh(answering, &of_initiator.public)];
    let shared = [&shared[0], &shared[1]];
    let sound2 = padded(&Said::by(&pair.responder, None).map(&pair.world));
    assert_eq!(
        seal2(&public(answering), shared, &sound2),
        message2,
        "two implementations of one message"
    );
    let mut second = |name: &str, message: Vec<u8>| {
        let case = json!({ "message": 2, "replaced_by": hex(&message) });
        file.invalid(&format!("message 2 by a member: {name}"), read(&message), case);
    };
    for (name, payload) in payloads(pair, &pair.responder, None) {
        second(name, seal2(&public(answering), shared, &payload));
    }
    let payload = padded(&Said::by(&pair.responder, Some(key)).map(&pair.world));
    second("an ML-KEM key", seal2(&public(answering), shared, &payload));
    second("an ephemeral key of zeros", seal2(&[0; 32], [&[0; 32]; 2], &sound2));
}

/// The keys that a handshake gives, the reacher's first, computed by the other implementation.
pub(super) fn keys_of_directions(
    prologue: &Prologue,
    reacher: &Agent,
    exposer: &Agent,
    [beginning, answering]: [&[u8]; 2],
    message1: &[u8],
    psk: &[u8; 32],
) -> [[u8; 32]; 2] {
    let [beginning, answering] =
        [beginning, answering].map(|secret| <&[u8; 32]>::try_from(secret).expect("32 bytes"));
    let responder = exposer.static_keypair.public();
    let responder = responder.as_bytes();
    let initiator: &[u8; 32] = reacher.static_keypair.secret();
    let [ephemeral, initiator] = [beginning, initiator].map(|key| Shared::of(key, responder));
    let (sent, mut state) =
        after_static_keys(&prologue.encode(), responder, &ephemeral, &initiator);
    assert_eq!(sent, message1[..sent.len()]);
    state.mix_hash(&message1[sent.len()..]);
    let shared = [&ephemeral, &initiator].map(|key| dh(answering, &key.public));
    answer(&mut state, &public(answering), [&shared[0], &shared[1]], psk);
    state.split()
}

/// Adds service records whose plaintext is not spelled as it must be.
pub(super) fn names(
    file: &mut File,
    world: &World,
    agent: &Agent,
    describe: impl Fn(&SealedRecord) -> serde_json::Value,
) {
    let source = &world.epoch.names;
    let keys = NameKeys::derive(source);
    let cipher = XChaCha20Poly1305::new(&kdf(source.as_bytes(), b"names").into());
    let (service, id) = (ServiceId(bytes("service")), agent.id());
    let nonce: [u8; 24] = bytes("nonce");
    let seal = |plaintext: &[u8]| {
        let place = [0u32.to_be_bytes(), 7u32.to_be_bytes()].concat();
        let aad = [&b"connect/v1 record\0"[..], &world.workspace.0, &service.0, &id.0, &place];
        let sealed = cipher.encrypt(&nonce.into(), Sealing { msg: plaintext, aad: &aad.concat() });
        let sealed = [nonce.as_slice(), &sealed.expect("it is short")].concat();
        SealedRecord { epoch: 0, counter: 7, sealed: sealed.into() }
    };
    let record = agent.identity.sign(&world.service_record(agent)).encode();
    let plaintext = |length: usize, record: &[u8], bytes: usize| {
        let mut plaintext = with_length(length, record);
        plaintext.resize(bytes, 0);
        plaintext
    };
    let sound = plaintext(record.len(), &record, 1024);
    let open = |sealed: &SealedRecord| keys.open_service(&world.workspace, service, id, sealed);
    open(&seal(&sound)).expect("it is spelled as it must be");
    let mut refuse = |name: &str, plaintext: &[u8]| {
        let sealed = seal(plaintext);
        file.invalid(&format!("by a member: {name}"), open(&sealed), describe(&sealed));
    };
    let mut dirty = sound.clone();
    dirty[1023] = 1;
    refuse("nothing", &[]);
    refuse("a length and nothing", &[0, 0]);
    refuse("no padding", &plaintext(record.len(), &record, record.len() + 2));
    refuse("padding that is not zero", &dirty);
    refuse("a byte of padding more", &plaintext(record.len(), &record, 1025));
    refuse("a block of padding more", &plaintext(record.len(), &record, 2048));
    refuse("a length beyond the end", &plaintext(1023, &record, 1024));
    refuse("a byte after the record", &plaintext(record.len() + 1, &record, 1024));
    refuse("longer than any", &plaintext(record.len(), &record, 8193));
}
