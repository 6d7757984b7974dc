//! The vectors: each valid case is checked and each invalid one refused while it is written.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use connect_crypto::{
    epoch::{EpochSecrets, ShareSecret},
    handshake::{HandshakeError, Local, Received, initiate, receive},
    invite::{HubAddress, Invite, InviteKeys, InviteSeed, ShareGrant},
    keys::{RecoveryKey, SigningKey, StaticKeypair, WrapKeypair},
    names::NameKeys,
    transport::{Opener, Transport},
};
use connect_spec::{
    cbor::FieldsWriter,
    check::{CheckReport, Outcome, Printable, Protocol, Resolved, TlsReport},
    control::{EpochWrap, SealedRecord},
    encoding::{Encoding, decode_base64, encode_base64},
    hash::hash,
    ids::{AgentId, ChannelId, CredentialId, ServiceId, ServiceName, TunnelId, WorkspaceId},
    keys::{WrapPublicKey, signed_text},
    log::{EntryHash, Head},
    objects::{
        AgentRecord, AgentRole, Certificate, Credential, CredentialKind, Genesis, Issuer, NoiseKey,
        ServiceRecord, ShareRecord,
    },
    prologue::{Prologue, Realm},
    record::{
        CloseCode, End, Progress, Purpose, Record, RekeyTry, ResetCode, StreamId, StreamState,
        put_trust_entry,
    },
    signed::{Body, Signed},
    trust::TrustState,
};
use serde_json::{Map, Value, json};

use crate::common::{Agent, DAY, NOW, TestRng, World, bytes, secret};

#[path = "channels.rs"]
mod channels;
#[path = "insider.rs"]
mod insider;
#[path = "log.rs"]
mod log;
#[path = "session.rs"]
mod session;

/// Where the vectors live.
pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/vectors")
}

/// Every file: its name and its text.
pub(crate) fn files() -> Vec<(String, String)> {
    let files = [
        hashes(),
        keys(),
        objects(),
        trust(),
        log::log(),
        invites(),
        shares(),
        names(),
        epochs(),
        prologues(),
        handshake(),
        records(),
        channels::channels(),
        checks(),
        packets(),
    ];
    files.into_iter().map(File::finish).collect()
}

/// The document that ends with the worked session.
pub(crate) fn document() -> PathBuf {
    directory().join("../PROTOCOL.md")
}

/// `text` of the document with the worked session as this implementation has it.
pub(crate) fn with_session(text: &str) -> String {
    let (before, _) = text.split_once(session::HEADING).expect("the document has the section");
    format!("{before}{}", session::section())
}

/// One file under construction.
struct File {
    name: &'static str,
    about: &'static str,
    given: Value,
    cases: Vec<Value>,
}

fn merged(parts: &[Value]) -> Value {
    let mut all = Map::new();
    for part in parts {
        for (key, value) in part.as_object().expect("parts are objects") {
            let before = all.insert(key.clone(), value.clone());
            assert!(before.is_none(), "{key} is there twice");
        }
    }
    Value::Object(all)
}

impl File {
    fn new(name: &'static str, about: &'static str) -> Self {
        Self { name, about, given: json!({}), cases: Vec::new() }
    }

    /// What all cases of the file share.
    fn given(mut self, given: Value) -> Self {
        self.given = given;
        self
    }

    fn valid(&mut self, name: &str, fields: Value) {
        self.cases.push(merged(&[json!({ "name": name, "valid": true }), fields]));
    }

    /// A case that must fail; `result` is what this implementation makes of it.
    #[track_caller]
    fn invalid<T, E: Display>(&mut self, name: &str, result: Result<T, E>, fields: Value) {
        let Some(reason) = result.err() else {
            panic!("{}: {name} must fail", self.name);
        };
        let outcome = json!({ "name": name, "valid": false, "reason": reason.to_string() });
        self.cases.push(merged(&[outcome, fields]));
    }

    fn finish(self) -> (String, String) {
        let mut names: Vec<_> = self.cases.iter().map(|case| case["name"].as_str()).collect();
        names.sort_unstable();
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
        assert_eq!(twice, None, "{}: the same name twice", self.name);
        let file = json!({ "about": self.about, "given": self.given, "cases": self.cases });
        let text = serde_json::to_string_pretty(&file).expect("JSON") + "\n";
        (format!("{}.json", self.name), text)
    }
}

fn hex(raw: impl AsRef<[u8]>) -> String {
    hex::encode(raw)
}

/// The same bytes with one bit changed.
fn flipped(raw: &[u8], position: usize) -> Vec<u8> {
    let mut changed = raw.to_vec();
    changed[position] ^= 1;
    changed
}

fn longer(raw: &[u8]) -> Vec<u8> {
    [raw, &[0]].concat()
}

fn shorter(raw: &[u8]) -> Vec<u8> {
    raw[..raw.len() - 1].to_vec()
}

fn hashes() -> File {
    let mut file = File::new(
        "hashes",
        "H(label, input), and the text that a signature covers: \"connect/v1 \" || kind || 0x00 || body",
    );
    for (label, input) in [("epoch", &b""[..]), ("epoch", b"abc"), ("agent-id", &[0xff; 100])] {
        let output = hash(label, &[input]);
        let case = json!({ "label": label, "input": hex(input), "output": hex(output) });
        file.valid(&format!("hash of {} bytes as {label}", input.len()), case);
    }
    let text = signed_text("certificate", b"body");
    file.valid(
        "signed text",
        json!({ "kind": "certificate", "input": hex(b"body"), "output": hex(text) }),
    );
    file
}

fn keys() -> File {
    let mut file = File::new(
        "keys",
        "Public halves that follow from seeds; recovery words; keys derived from an invite's seed; \
         signatures over \"connect/v1 \" || kind || 0x00 || body",
    );
    let signing = SigningKey::from_seed(secret("signer"));
    file.valid(
        "ed25519",
        json!({ "seed": hex(signing.seed().as_slice()), "public": hex(signing.public().0) }),
    );
    let keypair = StaticKeypair::from_secret(secret("static"));
    file.valid(
        "x25519",
        json!({ "secret": hex(keypair.secret().as_slice()), "public": hex(keypair.public().0) }),
    );
    let wrap = WrapKeypair::from_seed(secret("wrap"));
    file.valid(
        "wrap key: seed is x25519 32 || ml-kem d 32 || z 32",
        json!({
            "seed": hex(wrap.seed().as_slice()),
            "public": hex(wrap.public().encode()),
            "hash": hex(wrap.public().hash()),
        }),
    );
    let wire = wrap.public().encode();
    for (name, wire) in [("short", shorter(&wire)), ("long", longer(&wire))] {
        let decoded = WrapPublicKey::decode(&wire).ok_or("wrong length");
        file.invalid(&format!("wrap key, too {name}"), decoded, json!({ "public": hex(&wire) }));
    }

    let seed = InviteSeed::from_bytes(secret("invite seed"));
    let derived = InviteKeys::derive(&seed);
    file.valid(
        "keys of an invite",
        json!({
            "invite_seed": hex(seed.as_bytes().as_slice()),
            "signing_seed": hex(derived.signing.seed().as_slice()),
            "wrap_seed": hex(derived.wrap.seed().as_slice()),
        }),
    );

    let entropies = [("zeros", [0; 32]), ("ones", [0xff; 32]), ("any seed", bytes("recovery"))];
    for (name, entropy) in entropies {
        let words = RecoveryKey::generate(&mut Fixed(entropy.to_vec())).words();
        let key = RecoveryKey::from_words(&words).expect("just made");
        file.valid(
            &format!("recovery words of {name}"),
            json!({ "seed": hex(entropy), "words": *words, "public": hex(key.public().0) }),
        );
    }
    let word = |count: usize, last: &str| format!("{}{last}", "abandon ".repeat(count));
    for (name, words) in [
        ("23 recovery words", word(22, "art")),
        ("25 recovery words", word(24, "art")),
        ("12 recovery words, sound in themselves", word(11, "about")),
        ("a word that is not in the list", word(23, "arts")),
        ("a word that is not the right one", word(23, "army")),
        ("two words swapped", format!("art {}", word(22, "abandon"))),
    ] {
        file.invalid(name, RecoveryKey::from_words(&words), json!({ "words": words }));
    }

    let signature = signing.sign_text("login", b"body");
    let case = |kind: &str, body: &[u8], public: [u8; 32], signature: [u8; 64]| json!({ "kind": kind, "body": hex(body), "public": hex(public), "signature": hex(signature) });
    let public = signing.public();
    public.verify("login", b"body", &signature).expect("just signed");
    file.valid("signature", case("login", b"body", public.0, signature.0));
    let mut refuse =
        |name: &str, kind: &str, body: &[u8], public: [u8; 32], signature: [u8; 64]| {
            let verified = connect_spec::keys::IdentityKey(public).verify(
                kind,
                body,
                &connect_spec::keys::Signature(signature),
            );
            file.invalid(name, verified, case(kind, body, public, signature));
        };
    refuse("signature of another kind", "logout", b"body", public.0, signature.0);
    refuse("signature of another body", "login", b"bodY", public.0, signature.0);
    let other = SigningKey::from_seed(secret("other")).public();
    refuse("signature by another key", "login", b"body", other.0, signature.0);
    let changed = |position| flipped(&signature.0, position).try_into().expect("64 bytes");
    refuse("changed R", "login", b"body", public.0, changed(0));
    refuse("changed S", "login", b"body", public.0, changed(32));
    refuse("S plus the group order", "login", b"body", public.0, plus_order(signature.0));
    let mut identity_point = [0; 32];
    identity_point[0] = 1;
    let mut of_nothing = [0; 64];
    of_nothing[0] = 1;
    refuse("key of small order", "login", b"body", identity_point, of_nothing);
    refuse("key that is no point", "login", b"body", [2; 32], signature.0);
    file
}

/// The malleable twin of a signature: a lax verifier accepts it (RFC 8032 section 5.1.7).
fn plus_order(mut signature: [u8; 64]) -> [u8; 64] {
    const ORDER: [u8; 32] = [
        0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde,
        0x14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    let mut carry = 0;
    for (byte, order) in signature[32..].iter_mut().zip(ORDER) {
        let [low, high] = (u16::from(*byte) + u16::from(order) + carry).to_le_bytes();
        *byte = low;
        carry = u16::from(high);
    }
    signature
}

/// A byte string in canonical CBOR.
fn byte_string(raw: &[u8]) -> Vec<u8> {
    let length = u16::try_from(raw.len()).expect("objects are small");
    let [high, low] = length.to_be_bytes();
    let head = match length {
        0..24 => vec![0x40 | low],
        24..256 => vec![0x58, low],
        _ => vec![0x59, high, low],
    };
    [head.as_slice(), raw].concat()
}

/// The envelope around any body, well-formed or not.
fn envelope(body: &[u8], signatures: &[([u8; 32], [u8; 64])]) -> Vec<u8> {
    let count = u8::try_from(signatures.len()).expect("few signatures");
    let mut wire = [&[0x82][..], &byte_string(body), &[0x80 | count]].concat();
    for (key, signature) in signatures {
        wire.push(0x82);
        wire.extend(byte_string(key));
        wire.extend(byte_string(signature));
    }
    wire
}

fn sign(key: &SigningKey, kind: &str, body: &[u8]) -> ([u8; 32], [u8; 64]) {
    (key.public().0, key.sign_text(kind, body).0)
}

/// Parses and verifies an object that `key` alone must have signed.
fn judge<T: Body>(wire: &[u8], key: &SigningKey) -> Result<(), String> {
    let object = Signed::<T>::decode(wire).map_err(|error| error.to_string())?;
    object.verify_by(&key.public()).map_err(|error| error.to_string())
}

/// Appends a field to a map of fewer than 23 fields.
fn with_field(body: &[u8], field: &[u8]) -> Vec<u8> {
    let mut body = [body, field].concat();
    body[0] += 1;
    body
}

/// The cases that every kind of object shares.
fn object<T: Body>(file: &mut File, title: &str, key: &SigningKey, object: &T) {
    let kind = T::KIND;
    let body = object.encode();
    let signed = key.sign(object);
    let describe =
        |wire: &[u8]| json!({ "kind": kind, "signer": hex(key.public().0), "wire": hex(wire) });
    let mut valid = |name: &str, wire: &[u8], body: &[u8]| {
        judge::<T>(wire, key).expect(name);
        let parts = json!({ "body": hex(body), "hash": hex(hash(kind, &[body])) });
        file.valid(&format!("{title}: {name}"), merged(&[describe(wire), parts]));
    };
    valid("sound", &signed.encode(), &body);
    let optional = with_field(&body, &[0x18, 64, 0x01]);
    let wire = envelope(&optional, &[sign(key, kind, &optional)]);
    valid("unknown optional field 64", &wire, &optional);

    let mut invalid = |name: &str, wire: &[u8]| {
        file.invalid(&format!("{title}: {name}"), judge::<T>(wire, key), describe(wire));
    };
    let wire = signed.encode();
    invalid("nothing", &[]);
    invalid("last byte missing", &shorter(&wire));
    invalid("trailing byte", &longer(&wire));
    invalid("changed signature", &flipped(&wire, wire.len() - 1));
    invalid("changed key", &flipped(&wire, wire.len() - 67));
    invalid("no signature", &envelope(&body, &[]));
    let other = SigningKey::from_seed(secret("other"));
    let (own, foreign) = (sign(key, kind, &body), sign(&other, kind, &body));
    invalid("signed by another", &envelope(&body, &[foreign]));
    invalid("another's signature under the signer's key", &envelope(&body, &[(own.0, foreign.1)]));
    invalid("signed by two", &key_order(&body, [own, foreign]));
    invalid("signed twice", &envelope(&body, &[own, own]));
    let other_kind = if kind == "entry" { "recovery" } else { "entry" };
    invalid("signed as another kind", &envelope(&body, &[sign(key, other_kind, &body)]));

    // Bodies that break the canonical form; all are signed, so the signature is not what fails.
    let mut broken =
        |name: &str, body: &[u8]| invalid(name, &envelope(body, &[sign(key, kind, body)]));
    broken("body cut", &shorter(&body));
    broken("body with a trailing byte", &longer(&body));
    broken("body that is an array", &[0x80]);
    broken("version 2", &[&body[..2], &[2], &body[3..]].concat());
    broken("version in a longer form", &[&body[..2], &[0x18, 1], &body[3..]].concat());
    broken("version negative", &[&body[..2], &[0x20], &body[3..]].concat());
    broken("version null", &[&body[..2], &[0xf6], &body[3..]].concat());
    broken("version a float", &[&body[..2], &[0xf9, 0x3c, 0x00], &body[3..]].concat());
    broken("version tagged", &[&body[..2], &[0xc1, 0x01], &body[3..]].concat());
    broken("version missing", &[&[body[0] - 1], &body[3..]].concat());
    broken("version twice", &[&[body[0] + 1, 0, 1], &body[1..]].concat());
    broken("unknown critical field 63", &with_field(&body, &[0x18, 63, 0x01]));
    broken("fields out of order", &[&[body[0] + 1, 0x18, 64, 1], &body[1..]].concat());
    broken("a text as a key", &with_field(&body, &[0x61, b'a', 0x01]));
    broken("indefinite length", &[&[0xbf], &body[1..], &[0xff]].concat());
    let deep = [[0x18, 64].as_slice(), &[0x81; 8], &[0]].concat();
    broken("nested too deeply", &with_field(&body, &deep));
    // Key 64, and the head of a byte string: of 256 bytes and more it is one longer.
    let room = T::MAX_BYTES + 1 - body.len() - 2;
    let rest = if room - 2 < 256 { room - 2 } else { room - 3 };
    let long = with_field(&body, &[&[0x18, 64], byte_string(&vec![0; rest]).as_slice()].concat());
    assert_eq!(long.len(), T::MAX_BYTES + 1);
    broken("one byte too long", &long);
}

/// Two signatures in the order that the format wants.
fn key_order(body: &[u8], mut signatures: [([u8; 32], [u8; 64]); 2]) -> Vec<u8> {
    signatures.sort();
    envelope(body, &signatures)
}

/// An object that its own kind refuses, signed all the same.
fn refused_object<T: Body>(file: &mut File, name: &str, key: &SigningKey, object: &T) {
    let body = object.encode();
    let wire = envelope(&body, &[sign(key, T::KIND, &body)]);
    let case = json!({ "kind": T::KIND, "signer": hex(key.public().0), "wire": hex(&wire) });
    file.invalid(&format!("{}: {name}", T::KIND), judge::<T>(&wire, key), case);
}

fn objects() -> File {
    let mut file = File::new(
        "objects",
        "Signed objects: `wire` must parse as `kind` and carry one signature, that of `signer`",
    );
    let world = World::new();
    let agent = world.member("agent");
    let invite = world.admission("invite", CredentialKind::Invite);
    let share = world.admission("share", CredentialKind::Share);

    let genesis = world.genesis.object();
    object(&mut file, "genesis", &world.signer, genesis);
    let with = |change: fn(&mut Genesis)| {
        let mut genesis = genesis.clone();
        change(&mut genesis);
        genesis
    };
    for (name, changed) in [
        ("suite 2", with(|genesis| genesis.suite = 2)),
        ("no founder", with(|genesis| genesis.founders.clear())),
        (
            "no owner",
            with(|genesis| {
                genesis.founders[0].role = connect_spec::objects::SignerRole::Admin;
            }),
        ),
        (
            "the same founder twice",
            with(|genesis| {
                genesis.founders.push(genesis.founders[0].clone());
            }),
        ),
    ] {
        refused_object(&mut file, name, &world.signer, &changed);
    }

    let certificate = agent.presented.certificate.object();
    object(&mut file, "certificate", &world.signer, certificate);
    let services = Some(vec![ServiceId([0; 16]); 65]);
    let changed = Certificate { services, ..certificate.clone() };
    refused_object(&mut file, "65 services", &world.signer, &changed);

    object(&mut file, "invite", &world.signer, invite.credential.object());
    object(&mut file, "share", &world.signer, share.credential.object());
    let (invite, share) = (invite.credential.object(), share.credential.object());
    for (name, changed) in [
        ("no use", Credential { uses: 0, ..invite.clone() }),
        ("an invite for a guest", Credential { role: AgentRole::Guest, ..invite.clone() }),
        ("an invite with services", Credential { services: Some(Vec::new()), ..invite.clone() }),
        ("a share for a member", Credential { role: AgentRole::Member, ..share.clone() }),
        ("a share without services", Credential { services: None, ..share.clone() }),
    ] {
        refused_object(&mut file, name, &world.signer, &changed);
    }

    let noise_key = agent.presented.noise_key.object();
    object(&mut file, "NoiseKey", &agent.identity, noise_key);
    let changed = NoiseKey { suite: 2, ..noise_key.clone() };
    refused_object(&mut file, "suite 2", &agent.identity, &changed);

    let record = world.service_record(&agent);
    object(&mut file, "service record", &agent.identity, &record);
    for protocol in ["", "Postgres", "a-b", "abcdefghijklmnopq"] {
        let changed = ServiceRecord { protocol: protocol.to_owned(), ..record.clone() };
        let name = format!("protocol `{protocol}`");
        refused_object(&mut file, &name, &agent.identity, &changed);
    }

    let record = world.agent_record(&agent);
    object(&mut file, "agent record", &agent.identity, &record);
    for (name, tags) in [
        ("tags out of order", vec!["b", "a"]),
        ("a tag twice", vec!["a", "a"]),
        ("an empty tag", vec![""]),
        ("a tag in capitals", vec!["A"]),
        ("a tag of 33 characters", vec!["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]),
        ("17 tags", "a b c d e f g h i j k l m n o p q".split(' ').collect()),
    ] {
        let mut changed = AgentRecord { ..record.clone() };
        changed.attrs.tags = tags.into_iter().map(str::to_owned).collect();
        refused_object(&mut file, name, &agent.identity, &changed);
    }

    let name = || "prod-db".parse::<ServiceName>().expect("a name");
    let record = ShareRecord {
        workspace_id: world.workspace,
        share_id: share.id(),
        label: "acme contractor".parse().expect("a label"),
        names: vec![name()],
    };
    object(&mut file, "share record", &world.signer, &record);
    let changed = ShareRecord { names: vec![name(); 17], ..record };
    refused_object(&mut file, "a share record of 17 services", &world.signer, &changed);
    file
}

fn trust() -> File {
    let world = World::new();
    let mut file = File::new(
        "trust",
        "What an agent presents, judged at the genesis of the workspace: `expected` is the agent that \
         was named to the judge, `now` its clock",
    )
    .given(json!({
        "workspace_id": hex(world.workspace.0),
        "genesis": hex(world.genesis.encode()),
    }));
    let describe = |agent: &Agent, expected: AgentId, now: u64| {
        let credential = agent.presented.credential.as_ref().map(|c| hex(c.encode()));
        json!({
            "expected": hex(expected.0),
            "now": now,
            "certificate": hex(agent.presented.certificate.encode()),
            "credential": credential,
            "noise_key": hex(agent.presented.noise_key.encode()),
        })
    };
    let verify = |agent: &Agent, expected, now| {
        world.trust.verify_peer(expected, agent.presented.clone(), now)
    };
    let invite = world.admission("invite", CredentialKind::Invite);
    let share = world.admission("share", CredentialKind::Share);
    let (member, joiner, guest) =
        (world.member("agent"), world.joined("joiner", &invite), world.joined("guest", &share));
    let stranger = SigningKey::from_seed(secret("stranger"));
    let end = NOW + 90 * DAY;
    for (name, agent, now) in [
        ("certified by a signer", &member, NOW),
        ("certified under an invite", &joiner, NOW),
        ("certified under an invite, within a day of its end", &joiner, end + DAY),
        ("certified under a share", &guest, NOW),
        ("certified under a share, in its last second", &guest, end),
    ] {
        verify(agent, agent.id(), now).expect(name);
        file.valid(name, describe(agent, agent.id(), now));
    }

    let mut refuse = |name: &str, agent: &Agent, expected: AgentId, now: u64| {
        file.invalid(name, verify(agent, expected, now), describe(agent, expected, now));
    };
    let mut changed = |name: &str, agent: &dyn Fn() -> Agent, change: &dyn Fn(&mut Agent)| {
        let mut agent = agent();
        let expected = agent.id();
        change(&mut agent);
        refuse(name, &agent, expected, NOW);
    };
    let member = || world.member("agent");
    let joiner = || world.joined("joiner", &invite);
    let guest = || world.joined("guest", &share);
    let certify = |agent: &mut Agent, by: &SigningKey, change: &dyn Fn(&mut Certificate)| {
        let mut certificate = agent.presented.certificate.object().clone();
        change(&mut certificate);
        agent.presented.certificate = by.sign(&certificate);
    };
    let rekey = |agent: &mut Agent, by: &SigningKey, change: &dyn Fn(&mut NoiseKey)| {
        let mut noise_key = agent.presented.noise_key.object().clone();
        change(&mut noise_key);
        agent.presented.noise_key = by.sign(&noise_key);
    };
    let same = |_: &mut Certificate| {};
    let signer = &world.signer;

    changed("certificate of another workspace", &member, &|agent| {
        certify(agent, signer, &|c| c.workspace_id = WorkspaceId(bytes("other")));
    });
    changed("NoiseKey of another workspace", &member, &|agent| {
        let identity = SigningKey::from_seed(agent.identity.seed().clone());
        rekey(agent, &identity, &|key| key.workspace_id = WorkspaceId(bytes("other")));
    });
    changed("another agent's certificate", &member, &|agent| {
        agent.presented.certificate = world.member("other").presented.certificate;
    });
    changed("another agent's NoiseKey", &member, &|agent| {
        agent.presented.noise_key = world.member("other").presented.noise_key;
    });
    changed("NoiseKey for another agent", &member, &|agent| {
        let identity = SigningKey::from_seed(agent.identity.seed().clone());
        rekey(agent, &identity, &|key| key.agent_id = AgentId(bytes("other")));
    });
    changed("NoiseKey signed by the signer", &member, &|agent| rekey(agent, signer, &|_| {}));
    changed("issuer that is no signer", &member, &|agent| {
        certify(agent, &stranger, &|c| c.issuer = Issuer::Signer(stranger.public()));
    });
    changed("issuer that is the recovery key", &member, &|agent| {
        certify(agent, signer, &|c| c.issuer = Issuer::Signer(world.recovery.public()));
    });
    changed("certificate signed by a stranger", &member, &|agent| {
        certify(agent, &stranger, &same);
    });
    changed("certificate signed by the agent itself", &member, &|agent| {
        let identity = SigningKey::from_seed(agent.identity.seed().clone());
        certify(agent, &identity, &same);
    });
    changed("guest certified by a signer", &member, &|agent| {
        certify(agent, signer, &|c| c.role = AgentRole::Guest);
    });
    changed("services certified by a signer", &member, &|agent| {
        certify(agent, signer, &|c| c.services = Some(vec![ServiceId(bytes("service"))]));
    });
    changed("credential beside a signer's certificate", &member, &|agent| {
        agent.presented.credential = Some(invite.credential.clone());
    });
    changed("credential missing", &joiner, &|agent| agent.presented.credential = None);
    changed("another credential", &joiner, &|agent| {
        agent.presented.credential = Some(share.credential.clone());
    });
    changed("credential signed by a stranger", &joiner, &|agent| {
        agent.presented.credential = Some(stranger.sign(invite.credential.object()));
    });
    changed("certificate under an invite signed by the signer", &joiner, &|agent| {
        certify(agent, signer, &same);
    });
    changed("certificate under an invite signed by another invite", &joiner, &|agent| {
        certify(agent, &share.keys.signing, &same);
    });
    let by_invite = &invite.keys.signing;
    changed("role that the credential does not grant", &joiner, &|agent| {
        certify(agent, by_invite, &|c| c.role = AgentRole::Exposer);
    });
    changed("tags that the credential does not grant", &joiner, &|agent| {
        certify(agent, by_invite, &|c| c.attrs = bytes("other"));
    });
    changed("services that an invite does not name", &joiner, &|agent| {
        certify(agent, by_invite, &|c| c.services = Some(Vec::new()));
    });
    let by_share = &share.keys.signing;
    changed("service that the share does not name", &guest, &|agent| {
        certify(agent, by_share, &|c| c.services = Some(vec![ServiceId(bytes("other"))]));
    });
    changed("one service more than the share names", &guest, &|agent| {
        certify(agent, by_share, &|c| {
            c.services = Some(vec![ServiceId(bytes("service")), ServiceId(bytes("other"))]);
        });
    });
    changed("member under a share", &guest, &|agent| {
        certify(agent, by_share, &|c| c.role = AgentRole::Member);
    });
    let old = NOW - DAY - 1;
    changed("certificate that ended", &member, &|agent| {
        certify(agent, signer, &|c| c.not_after = Some(old));
    });
    let (joiner, guest, member) = (joiner(), guest(), member());
    refuse("a day and a second after the invite's end", &joiner, joiner.id(), end + DAY + 1);
    refuse("a second after the share's end", &guest, guest.id(), end + 1);
    refuse("another agent was expected", &member, joiner.id(), NOW);

    let foreign = World::named("other");
    let stranger = foreign.member("agent");
    refuse("member of another workspace", &stranger, stranger.id(), NOW);
    let other_anchor = TrustState::from_genesis(foreign.workspace, &world.genesis);
    assert!(other_anchor.is_err());
    file
}

/// A body of an invite that breaks a rule, with a checksum that holds.
fn invite_line(body: &[u8]) -> String {
    bech32::encode::<bech32::Bech32m>(bech32::Hrp::parse("pc").expect("letters"), body)
        .expect("short")
}

/// The same body with other bits after its end, and the checksum that belongs to them.
fn other_padding(line: &str) -> String {
    use bech32::{ByteIterExt, Fe32, Fe32IterExt, primitives::decode::CheckedHrpstring};
    let hrp = bech32::Hrp::parse("pc").expect("letters");
    let checked = CheckedHrpstring::new::<bech32::Bech32m>(line).expect("a sound line");
    let mut digits: Vec<Fe32> = checked.byte_iter().bytes_to_fes().collect();
    let last = digits.last_mut().expect("not empty");
    *last = Fe32::try_from(last.to_u8() | 1).expect("five bits");
    digits.into_iter().with_checksum::<bech32::Bech32m>(&hrp).chars().collect()
}

fn invites() -> File {
    let mut file = File::new(
        "invites",
        "Invites: bech32m (BIP-350) with the prefix `pc` over one canonical CBOR map",
    );
    let world = World::new();
    let url = "https://hub.example.com:7420";
    let pinned = format!("{url}#sha256={}", "5a".repeat(32));
    let later = Head { seq: 70_000, hash: EntryHash(bytes("head")) };
    for (name, hub, head, tags) in [
        ("at the genesis", url, world.head(), &[][..]),
        ("with a pinned certificate", pinned.as_str(), world.head(), &[]),
        ("at a later head", url, later, &[]),
        ("of a hub on this machine", "http://127.0.0.1:7420", world.head(), &[]),
        ("with tags", url, world.head(), &["ci", "db"]),
    ] {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        let invite = Invite { head, tags, ..world.invite(hub) };
        let line = invite.reveal();
        assert!(line.parse::<Invite>().is_ok(), "{name}");
        file.valid(
            name,
            json!({
                "invite": *line,
                "hub_url": invite.hub.url,
                "pin": invite.hub.pin.map(hex),
                "workspace_id": hex(invite.workspace_id.0),
                "log_seq": head.seq,
                "log_head": hex(head.hash.0),
                "seed": hex(invite.seed.as_bytes().as_slice()),
                "tags": invite.tags,
                "attrs": invite.attributes().ok().map(|attrs| hex(attrs.hash())),
            }),
        );
    }

    let secret_of_share = secret("share secret");
    let label = "acme contractor";
    for (name, hub) in [("of a share", url), ("of a share, with a pinned certificate", &pinned)] {
        let secret = ShareSecret::from_bytes(secret_of_share.clone());
        let share = Some(ShareGrant { secret, label: label.parse().expect("a label") });
        let line = Invite { share, ..world.invite(hub) }.reveal();
        let read: Invite = line.parse().expect("just written");
        let seed = hex(read.seed.as_bytes().as_slice());
        let share = read.share.expect("it is one");
        assert_eq!(**share.secret.as_bytes(), *secret_of_share, "{name}");
        file.valid(
            name,
            json!({
                "invite": *line,
                "hub_url": read.hub.url,
                "pin": read.hub.pin.map(hex),
                "seed": seed,
                "share_secret": hex(secret_of_share.as_slice()),
                "label": share.label,
            }),
        );
    }

    let optional = FieldsWriter::new()
        .uint(0, 1u8)
        .text(1, url)
        .bytes(3, &world.workspace.0)
        .uint(4, 0u8)
        .bytes(5, &world.workspace.0)
        .bytes(7, &bytes::<32>("invite seed"))
        .uint(64, 1u8);
    let with_optional = invite_line(&optional.finish());
    let read: Invite = with_optional.parse().expect("unknown optional fields are ignored");
    assert_eq!(read.hub.url, url);
    file.valid("with an unknown optional field", json!({ "invite": with_optional }));

    let line = world.invite(url).reveal();
    let mut refuse = |name: &str, line: &str| {
        file.invalid(name, line.parse::<Invite>(), json!({ "invite": line }));
    };
    refuse("empty", "");
    refuse("another bech32 string", "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4");
    refuse("a URL", url);
    refuse("in capitals", &line.to_uppercase());
    refuse("prefix alone", "pc1");
    refuse("first character changed", &format!("q{}", &line[1..]));
    for position in [3, 50, 100, 150, 200, line.len() - 1] {
        let other = if line[position..].starts_with('q') { 'p' } else { 'q' };
        let changed = format!("{}{other}{}", &line[..position], &line[position + 1..]);
        refuse(&format!("character {position} changed"), &changed);
    }
    refuse("character lost", &format!("{}{}", &line[..90], &line[91..]));
    refuse("character doubled", &format!("{}{}", &line[..90], &line[89..]));
    refuse("cut", &line[..line.len() - 6]);
    refuse("space inside", &format!("{} {}", &line[..90], &line[90..]));
    refuse(
        "capital inside",
        &format!("{}{}{}", &line[..90], line[90..100].to_uppercase(), &line[100..]),
    );
    refuse("1,024 characters", &format!("pc1{}", "q".repeat(1021)));

    let genesis = world.workspace.0;
    let body = |version: u64, hub: &str, head: Head, seed: &[u8]| {
        FieldsWriter::new()
            .uint(0, version)
            .text(1, hub)
            .bytes(3, &genesis)
            .uint(4, head.seq)
            .bytes(5, &head.hash.0)
            .bytes(7, seed)
            .finish()
    };
    let (head, seed) = (world.head(), bytes::<32>("invite seed"));
    let sound = body(1, url, head, &seed);
    assert_eq!(invite_line(&sound), *line);
    let hrp = bech32::Hrp::parse("pd").expect("letters");
    let other_prefix = bech32::encode::<bech32::Bech32m>(hrp, &sound).expect("short");
    refuse("another prefix", &other_prefix);
    let hrp = bech32::Hrp::parse("pc").expect("letters");
    let old_checksum = bech32::encode::<bech32::Bech32>(hrp, &sound).expect("short");
    refuse("checksum of bech32, not bech32m", &old_checksum);
    refuse("version 2", &invite_line(&body(2, url, head, &seed)));
    refuse("empty body", &invite_line(&[]));
    refuse("trailing byte in the body", &invite_line(&longer(&sound)));
    refuse(
        "version in a longer form",
        &invite_line(&[&sound[..2], &[0x18, 1], &sound[3..]].concat()),
    );
    refuse("seed of 31 bytes", &invite_line(&body(1, url, head, &seed[1..])));
    refuse("hub of another scheme", &invite_line(&body(1, "ftp://hub.example", head, &seed)));
    refuse("pin inside the URL", &invite_line(&body(1, &pinned, head, &seed)));
    let long_url = format!("https://{}", "h".repeat(248));
    refuse("hub URL of 256 characters", &invite_line(&body(1, &long_url, head, &seed)));
    let not_genesis = Head { seq: 0, hash: EntryHash(bytes("other")) };
    refuse("head 0 that is not the genesis", &invite_line(&body(1, url, not_genesis, &seed)));
    refuse("unknown critical field", &invite_line(&with_field(&sound, &[0x0a, 0x00])));
    let share = |secret: &[u8], label: Option<&str>| {
        let map = FieldsWriter::new()
            .uint(0, 1u8)
            .text(1, url)
            .bytes(3, &genesis)
            .uint(4, head.seq)
            .bytes(5, &head.hash.0)
            .bytes(7, &seed)
            .bytes(8, secret);
        invite_line(&map.optional(label, |map, label| map.text(9, label)).finish())
    };
    assert!(share(&[1; 32], Some("x")).parse::<Invite>().is_ok());
    refuse("share without a label", &share(&[1; 32], None));
    refuse("share whose label is empty", &share(&[1; 32], Some("")));
    refuse("share whose label has a line break", &share(&[1; 32], Some("a\nb")));
    refuse("share secret of 31 bytes", &share(&[1; 31], Some("x")));
    let label_alone = with_field(&sound, &[0x09, 0x61, b'x']);
    refuse("label without a share secret", &invite_line(&label_alone));
    let padding_bits = other_padding(&invite_line(&sound));
    refuse("padding bits that are not zero", &padding_bits);

    for hub in [
        "hub.example",
        "HTTPS://hub.example",
        "ftp://hub.example",
        "https://",
        "https://hub example",
        "https://hub.example#",
        "https://hub.example#sha256=00",
        "https://hub.example#sha256=5A5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a",
    ] {
        let parsed = hub.parse::<HubAddress>();
        let name = format!("hub address `{hub}`");
        file.invalid(&name, parsed, json!({ "hub_address": hub }));
    }
    file
}

fn shares() -> File {
    let world = World::new();
    let share = world.admission("share", CredentialKind::Share);
    let (workspace, id) = (world.workspace, share.credential.object().id());
    let realm = world.epoch.realm.as_bytes();
    let secret = ShareSecret::derive(&world.epoch.realm, &id);
    let secrets = secret.secrets();
    let derived = kdf(realm, &[b"share ".as_slice(), &id.0].concat());
    assert_eq!(**secret.as_bytes(), derived);
    assert_eq!(**secrets.realm.as_bytes(), kdf(&derived, b"share realm"));
    assert_eq!(**secrets.names.as_bytes(), kdf(&derived, b"share names"));
    let keys = NameKeys::derive(&secrets.names);
    let issuer = world.signer.public();
    let mut file = File::new(
        "shares",
        "What follows from a share's id and the realm secret M, and the record that its signer leaves for \
         the members: `sealed` is nonce 24 || ciphertext",
    )
    .given(json!({
        "realm_secret": hex(realm.as_slice()),
        "workspace_id": hex(workspace.0),
        "share_id": hex(id.0),
        "share_secret": hex(derived),
        "share_realm_secret": hex(secrets.realm.as_bytes().as_slice()),
        "share_name_source": hex(secrets.names.as_bytes().as_slice()),
        "issuer": hex(issuer.0),
    }));
    let name: ServiceName = "prod-db".parse().expect("a name");
    file.valid(
        "lookup tag of a shared service",
        json!({ "service_name": name, "tag": hex(keys.tag(&name).0) }),
    );
    let record = ShareRecord {
        workspace_id: workspace,
        share_id: id,
        label: "acme contractor".parse().expect("a label"),
        names: vec![name],
    };
    let rng = &mut TestRng::new("shares");
    let signed = world.signer.sign(&record);
    let sealed = keys.seal_share(&signed, rng).expect("it fits");
    let describe = |workspace: WorkspaceId, id: CredentialId, sealed: &[u8]| json!({ "workspace_id": hex(workspace.0), "share_id": hex(id.0), "sealed": hex(sealed) });
    assert_eq!(keys.open_share(&workspace, id, &issuer, &sealed).expect("just sealed"), signed);
    let object = json!({ "object": hex(signed.encode()) });
    file.valid("record of a share", merged(&[describe(workspace, id, &sealed.0), object]));

    let mut refuse = |name: &str, workspace: WorkspaceId, id: CredentialId, sealed: &[u8]| {
        let opened = keys.open_share(&workspace, id, &issuer, &sealed.to_vec().into());
        file.invalid(name, opened, describe(workspace, id, sealed));
    };
    let other = CredentialId(bytes("other"));
    refuse("moved to another workspace", WorkspaceId(bytes("other")), id, &sealed.0);
    refuse("moved to another share", workspace, other, &sealed.0);
    refuse("changed", workspace, id, &flipped(&sealed.0, 30));
    refuse("cut", workspace, id, &shorter(&sealed.0));
    refuse("nothing", workspace, id, &[]);
    let stranger = world.member("stranger");
    let forged = keys.seal_share(&stranger.identity.sign(&record), rng).expect("it fits");
    refuse("signed by a member that did not make the share", workspace, id, &forged.0);
    let of_other = world.signer.sign(&ShareRecord { share_id: other, ..record });
    let of_other = keys.seal_share(&of_other, rng).expect("it fits");
    refuse("record of another share", workspace, id, &of_other.0);
    file
}

/// `KDF(k, l)`, by another implementation of HMAC than the one under test.
fn kdf(key: &[u8; 32], label: &[u8]) -> [u8; 32] {
    use hmac::{KeyInit, Mac, SimpleHmac};
    let mut mac = SimpleHmac::<blake2::Blake2s256>::new_from_slice(key).expect("any length");
    mac.update(b"connect/v1 ");
    mac.update(label);
    mac.finalize().into_bytes().into()
}

fn names() -> File {
    let world = World::new();
    let source = &world.epoch.names;
    let keys = NameKeys::derive(source);
    let (name_key, index_key) =
        (kdf(source.as_bytes(), b"names"), kdf(source.as_bytes(), b"index"));
    let agent = world.member("agent");
    let (workspace, service, id) = (world.workspace, ServiceId(bytes("service")), agent.id());
    let mut file = File::new(
        "names",
        "Lookup tags, and records sealed with XChaCha20-Poly1305: `sealed` is nonce 24 || ciphertext; \
         a case opens `sealed` as what the hub lists under the ids, epoch and counter beside it",
    )
    .given(json!({
        "name_source": hex(source.as_bytes().as_slice()),
        "name_key": hex(name_key),
        "index_key": hex(index_key),
        "identity": hex(agent.identity.public().0),
    }));
    for text in ["prod-db", "a", "0", "xn--bcher-kva"] {
        let name: ServiceName = text.parse().expect("a name");
        let tag = keys.tag(&name);
        assert_eq!(tag.0, kdf(&index_key, text.as_bytes())[..16]);
        file.valid(
            &format!("lookup tag of `{text}`"),
            json!({ "service_name": text, "tag": hex(tag.0) }),
        );
    }
    for text in ["", "-a", "a-", "a_b", "a.b", "a b", "b\u{fc}cher", &"a".repeat(64)] {
        file.invalid(
            &format!("service name `{text}`"),
            text.parse::<ServiceName>(),
            json!({ "service_name": text }),
        );
    }

    let describe = |kind: &str,
                    workspace: &WorkspaceId,
                    object: [u8; 16],
                    agent: AgentId,
                    sealed: &SealedRecord| {
        json!({
            "kind": kind,
            "workspace_id": hex(workspace.0),
            "object_id": hex(object),
            "agent_id": hex(agent.0),
            "epoch": sealed.epoch,
            "counter": sealed.counter,
            "sealed": hex(&sealed.sealed.0),
        })
    };

    let rng = &mut TestRng::new("names");
    let record = agent.identity.sign(&world.service_record(&agent));
    let sealed = keys.seal_service(&record, rng).expect("it fits");
    let opened = keys.open_service(&workspace, service, id, &sealed).expect("just sealed");
    assert_eq!(opened, record);
    let case = describe("service-record", &workspace, service.0, id, &sealed);
    file.valid("service record", merged(&[case, json!({ "object": hex(record.encode()) })]));

    let mut refuse = |name: &str,
                      workspace: WorkspaceId,
                      service: ServiceId,
                      agent: AgentId,
                      sealed: &SealedRecord| {
        file.invalid(
            name,
            keys.open_service(&workspace, service, agent, sealed),
            describe("service-record", &workspace, service.0, agent, sealed),
        );
    };
    let other = world.member("other");
    refuse("moved to another workspace", WorkspaceId(bytes("other")), service, id, &sealed);
    refuse("moved to another service", workspace, ServiceId(bytes("other")), id, &sealed);
    refuse("moved to another agent", workspace, service, other.id(), &sealed);
    let at = |epoch, counter, blob: Vec<u8>| SealedRecord { epoch, counter, sealed: blob.into() };
    let blob = &sealed.sealed.0;
    refuse("moved to another epoch", workspace, service, id, &at(1, 7, blob.clone()));
    refuse("moved to another counter", workspace, service, id, &at(0, 8, blob.clone()));
    for (name, position) in [("nonce", 0), ("ciphertext", 24), ("tag", blob.len() - 1)] {
        let name = format!("changed {name}");
        refuse(&name, workspace, service, id, &at(0, 7, flipped(blob, position)));
    }
    refuse("cut", workspace, service, id, &at(0, 7, shorter(blob)));
    refuse("longer", workspace, service, id, &at(0, 7, longer(blob)));
    refuse("nonce alone", workspace, service, id, &at(0, 7, blob[..24].to_vec()));
    refuse("nothing", workspace, service, id, &at(0, 7, Vec::new()));
    let forged = other.identity.sign(&world.service_record(&agent));
    let sealed = keys.seal_service(&forged, rng).expect("it fits");
    refuse("signed by another member", workspace, service, id, &sealed);
    let mut stolen = world.service_record(&agent);
    stolen.certificate = other.presented.certificate.clone();
    let stolen = keys.seal_service(&other.identity.sign(&stolen), rng).expect("it fits");
    refuse("with another member's certificate", workspace, service, id, &stolen);
    insider::names(&mut file, &world, &agent, |sealed| {
        describe("service-record", &workspace, service.0, id, sealed)
    });

    let record = agent.identity.sign(&world.agent_record(&agent));
    let sealed = keys.seal_agent(&record, rng).expect("it fits");
    let identity = agent.identity.public();
    let opened = keys.open_agent(&workspace, id, &identity, &sealed).expect("just sealed");
    assert_eq!(opened, record);
    let case = describe("agent-record", &workspace, id.0, id, &sealed);
    file.valid("agent record", merged(&[case, json!({ "object": hex(record.encode()) })]));
    let as_service = keys.open_service(&workspace, ServiceId(id.0), id, &sealed);
    let case = describe("service-record", &workspace, id.0, id, &sealed);
    file.invalid("agent record as a service record", as_service, case);
    let mut refuse = |name: &str, sealed: &SealedRecord| {
        file.invalid(
            name,
            keys.open_agent(&workspace, id, &identity, sealed),
            describe("agent-record", &workspace, id.0, id, sealed),
        );
    };
    let blob = &sealed.sealed.0;
    refuse("agent record moved to another epoch", &at(1, 3, blob.clone()));
    refuse("agent record moved to another counter", &at(0, 4, blob.clone()));
    refuse("agent record changed", &at(0, 3, flipped(blob, 30)));
    let forged = other.identity.sign(&world.agent_record(&agent));
    let forged = keys.seal_agent(&forged, rng).expect("it fits");
    refuse("agent record signed by another member", &forged);
    file
}

/// Randomness given as bytes.
struct Fixed(Vec<u8>);

impl rand_core::TryRng for Fixed {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        unreachable!("only bytes are drawn")
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        unreachable!("only bytes are drawn")
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Self::Error> {
        let rest = self.0.split_off(out.len());
        out.copy_from_slice(&self.0);
        self.0 = rest;
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Fixed {}

fn epochs() -> File {
    let world = World::new();
    let (workspace, commit) = (world.workspace, world.epoch.commit());
    let keys = WrapKeypair::from_seed(secret("wrap"));
    let mut file = File::new(
        "epochs",
        "Wraps of M || W: `sealed` is x25519 ephemeral 32 || ml-kem ciphertext 1088 || ciphertext 80",
    )
    .given(json!({
        "realm_secret": hex(world.epoch.realm.as_bytes().as_slice()),
        "name_source": hex(world.epoch.names.as_bytes().as_slice()),
    }));
    let describe =
        |workspace: &WorkspaceId, keys: &WrapKeypair, commit: &[u8; 32], wrap: &EpochWrap| {
            json!({
                "workspace_id": hex(workspace.0),
                "epoch": wrap.epoch,
                "commit": hex(commit),
                "wrap_seed": hex(keys.seed().as_slice()),
                "sealed": hex(&wrap.sealed.0),
            })
        };
    let rng = &mut TestRng::new("epochs");
    let wrap = world.epoch.wrap(&workspace, 5, &keys.public(), rng).expect("a sound key");
    let opened = EpochSecrets::open(&wrap, &workspace, &keys, &commit).expect("just wrapped");
    assert_eq!(opened.to_bytes(), world.epoch.to_bytes());
    let [ephemeral, m] = rng.draws.as_slice() else { panic!("a wrap draws twice") };
    let randomness = json!({ "ephemeral_secret": hex(ephemeral), "ml_kem_m": hex(m) });
    file.valid("wrap", merged(&[describe(&workspace, &keys, &commit, &wrap), randomness]));

    let mut refuse = |name: &str,
                      workspace: WorkspaceId,
                      keys: &WrapKeypair,
                      commit: [u8; 32],
                      wrap: &EpochWrap| {
        file.invalid(
            name,
            EpochSecrets::open(wrap, &workspace, keys, &commit),
            describe(&workspace, keys, &commit, wrap),
        );
    };
    let other = WrapKeypair::from_seed(secret("other wrap"));
    refuse("for another workspace", WorkspaceId(bytes("other")), &keys, commit, &wrap);
    refuse("for another key", workspace, &other, commit, &wrap);
    refuse("against another commit", workspace, &keys, bytes("other"), &wrap);
    let mut at = |name: &str, epoch: u32, blob: Vec<u8>| {
        refuse(name, workspace, &keys, commit, &EpochWrap { epoch, sealed: blob.into() });
    };
    let blob = &wrap.sealed.0;
    at("for another epoch", 6, blob.clone());
    at("changed ephemeral key", 5, flipped(blob, 0));
    at("ephemeral key of zeros", 5, [&[0; 32], &blob[32..]].concat());
    at("changed ML-KEM ciphertext", 5, flipped(blob, 32));
    at("changed end of the ML-KEM ciphertext", 5, flipped(blob, 1119));
    at("changed ciphertext", 5, flipped(blob, 1120));
    at("changed tag", 5, flipped(blob, blob.len() - 1));
    at("cut", 5, shorter(blob));
    at("longer", 5, longer(blob));
    at("nothing", 5, Vec::new());
    let half = |kept: std::ops::Range<usize>| {
        let mut seed = secret::<96>("other wrap");
        seed[kept.clone()].copy_from_slice(&keys.seed()[kept]);
        WrapKeypair::from_seed(seed)
    };
    refuse("with the right X25519 key alone", workspace, &half(0..32), commit, &wrap);
    refuse("with the right ML-KEM key alone", workspace, &half(32..96), commit, &wrap);

    let sound = keys.public();
    for (name, key) in [
        ("wrap to an X25519 key of zeros", WrapPublicKey { x25519: [0; 32], ..sound.clone() }),
        (
            "wrap to an ML-KEM key that is not canonical",
            WrapPublicKey { ml_kem: Box::new([0xff; 1184]), ..sound },
        ),
    ] {
        let wrap = world.epoch.wrap(&workspace, 5, &key, &mut TestRng::new("epochs"));
        file.invalid(name, wrap, json!({ "wrap_key": hex(key.encode()) }));
    }
    file
}

fn prologue_fields(prologue: &Prologue) -> Value {
    json!({
        "workspace_id": hex(prologue.workspace_id.0),
        "tunnel_id": hex(prologue.tunnel_id.0),
        "service_id": hex(prologue.service_id.0),
        "initiator": hex(prologue.initiator.0),
        "responder": hex(prologue.responder.0),
        "share_id": hex(prologue.share_id.0),
        "channel_id": hex(prologue.channel_id.0),
        "tunnel_no": prologue.tunnel_no,
        "rekey": prologue.rekey,
        "previous_hash": hex(prologue.previous_hash),
        "realm": prologue.realm.number(),
        "encoding": prologue.encoding.number(),
        "encoded": hex(prologue.encode()),
    })
}

type PrologueChange = (&'static str, fn(&mut Prologue));

/// One change for every field.
const PROLOGUE_CHANGES: [PrologueChange; 12] = [
    ("workspace id", |prologue| prologue.workspace_id = WorkspaceId(bytes("other"))),
    ("tunnel id", |prologue| prologue.tunnel_id = TunnelId(bytes("other"))),
    ("service id", |prologue| prologue.service_id = ServiceId(bytes("other"))),
    ("initiator", |prologue| prologue.initiator = AgentId(bytes("other"))),
    ("responder", |prologue| prologue.responder = AgentId(bytes("other"))),
    ("share id", |prologue| prologue.share_id = CredentialId(bytes("other"))),
    ("channel id", |prologue| prologue.channel_id = ChannelId(bytes("other"))),
    ("tunnel number", |prologue| prologue.tunnel_no = 0x0102_0304),
    ("rekey number", |prologue| prologue.rekey = 0x0506_0708),
    ("previous hash", |prologue| prologue.previous_hash = bytes("other")),
    ("realm", |prologue| prologue.realm = Realm::Share),
    ("encoding", |prologue| prologue.encoding = Encoding::Binary),
];

fn prologues() -> File {
    let mut file = File::new(
        "prologues",
        "The 191 bytes of the prologue; they are only ever written, so none of these can fail",
    );
    let world = World::new();
    let sound = world.prologue(&world.member("initiator"), &world.member("responder"));
    file.valid("first tunnel of a member", prologue_fields(&sound));
    for (name, change) in PROLOGUE_CHANGES {
        let mut prologue = sound.clone();
        change(&mut prologue);
        assert_ne!(prologue.encode(), sound.encode());
        file.valid(&format!("another {name}"), prologue_fields(&prologue));
    }
    file
}

/// The psk, computed from what the vectors give and not by the code under test.
fn psk(realm_secret: &[u8], kem_seed: &[u8], message2: &[u8]) -> ([u8; 32], [u8; 32]) {
    use ml_kem::{Decapsulate, KeyExport};
    let seed = ml_kem::Seed::try_from(kem_seed).expect("64 bytes");
    let key = ml_kem::ml_kem_768::DecapsulationKey::from_seed(seed);
    let ciphertext = &message2[..1088];
    let kem_secret = key.decapsulate_slice(ciphertext).expect("1,088 bytes");
    let ek = hash("ek", &[&key.encapsulation_key().to_bytes()]);
    let ct = hash("ct", &[ciphertext]);
    let psk = hash("psk", &[&[0, 1, 1], realm_secret, &kem_secret, &ek, &ct]);
    (kem_secret.into(), psk)
}

/// The two members of the handshake vectors.
struct Pair {
    world: World,
    initiator: Agent,
    responder: Agent,
    prologue: Prologue,
}

impl Pair {
    fn local<'k>(&'k self, agent: &'k Agent) -> Local<'k> {
        self.world.local(agent)
    }

    fn initiate(&self, rng: &mut TestRng) -> (connect_crypto::handshake::AwaitReply, Vec<u8>) {
        let to = self.responder.static_keypair.public();
        initiate(&self.local(&self.initiator), &self.prologue, &to, rng).expect("sound keys")
    }

    fn receive(&self, prologue: &Prologue, message1: &[u8]) -> Result<Received, HandshakeError> {
        receive(&self.responder.static_keypair, prologue, message1)
    }

    fn answer(
        &self,
        received: Received,
        local: &Local<'_>,
        rng: &mut TestRng,
    ) -> (Transport, Vec<u8>) {
        let peer = self.peer(&self.initiator);
        received.answer(&peer, local, rng).expect("a sound initiator")
    }

    fn peer(&self, agent: &Agent) -> connect_spec::trust::VerifiedPeer {
        let presented = agent.presented.clone();
        self.world.trust.verify_peer(agent.id(), presented, NOW).expect("a member")
    }

    /// What the initiator makes of `message2`.
    fn read(&self, message2: &[u8]) -> Result<Transport, HandshakeError> {
        let (state, _) = self.initiate(&mut TestRng::new("initiator"));
        state.read(message2)?.confirm(&self.peer(&self.responder))
    }
}

fn agent_fields(agent: &Agent) -> Value {
    json!({
        "agent_id": hex(agent.id().0),
        "static_secret": hex(agent.static_keypair.secret().as_slice()),
        "certificate": hex(agent.presented.certificate.encode()),
        "noise_key": hex(agent.presented.noise_key.encode()),
        "attrs_salt": hex(agent.attrs.salt),
        "attrs_tags": agent.attrs.tags,
    })
}

fn seal_all(transport: Transport, plaintexts: &[&[u8]]) -> (Vec<Vec<u8>>, Opener) {
    let (mut sealer, opener) = transport.split();
    let seal = |plaintext: &&[u8]| {
        let mut record = plaintext.to_vec();
        sealer.seal(&mut record, 0).expect("short");
        record
    };
    (plaintexts.iter().map(seal).collect(), opener)
}

fn handshake() -> File {
    let world = World::new();
    let (initiator, responder) = (world.member("initiator"), world.member("responder"));
    let prologue = world.prologue(&initiator, &responder);
    let pair = Pair { world, initiator, responder, prologue };

    let (initiator_rng, responder_rng) =
        (&mut TestRng::new("initiator"), &mut TestRng::new("responder"));
    let (_, message1) = pair.initiate(initiator_rng);
    let received = pair.receive(&pair.prologue, &message1).expect("sound message");
    let (theirs, message2) = pair.answer(received, &pair.local(&pair.responder), responder_rng);
    let ours = pair.read(&message2).expect("sound message");
    assert_eq!(ours.handshake_hash(), theirs.handshake_hash());
    let handshake_hash = ours.handshake_hash();
    let [kem_seed, initiator_ephemeral] = initiator_rng.draws.as_slice() else {
        panic!("the initiator draws twice")
    };
    let [kem_m, responder_ephemeral] = responder_rng.draws.as_slice() else {
        panic!("the responder draws twice")
    };

    let mut file = File::new(
        "handshake",
        "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s with ML-KEM-768 in the psk, between the two agents \
         given, and the first records after it. A case changes the one thing that it names: \
         `message` 1 or 2, or a `record` of the initiator; `position` is the byte that is xored with 1, \
         `length` what is left of it, `append` what follows it",
    )
    .given(json!({
        "workspace_id": hex(pair.world.workspace.0),
        "genesis": hex(pair.world.genesis.encode()),
        "realm_secret": hex(pair.world.epoch.realm.as_bytes().as_slice()),
        "log_seq": pair.world.head().seq,
        "log_head": hex(pair.world.head().hash.0),
        "initiator": agent_fields(&pair.initiator),
        "responder": agent_fields(&pair.responder),
        "prologue": hex(pair.prologue.encode()),
        "initiator_ml_kem_seed": hex(kem_seed),
        "initiator_ephemeral_secret": hex(initiator_ephemeral),
        "responder_ml_kem_m": hex(kem_m),
        "responder_ephemeral_secret": hex(responder_ephemeral),
    }));

    let (our_texts, their_texts) = ([&b"first"[..], b"", b"third"], [&b"answer"[..]]);
    let (our_records, mut our_opener) = seal_all(ours, &our_texts);
    let (their_records, _) = seal_all(theirs, &their_texts);
    our_opener.open(&mut their_records[0].clone()).expect("sound record");
    let (kem_secret, psk) = psk(pair.world.epoch.realm.as_bytes().as_slice(), kem_seed, &message2);
    let list = |items: &[Vec<u8>]| items.iter().map(hex).collect::<Vec<_>>();
    file.valid(
        "handshake",
        json!({
            "message1": hex(&message1),
            "message2": hex(&message2),
            "ml_kem_secret": hex(kem_secret),
            "psk": hex(psk),
            "handshake_hash": hex(handshake_hash),
            "initiator_plaintexts": our_texts.iter().map(hex).collect::<Vec<_>>(),
            "initiator_records": list(&our_records),
            "responder_plaintexts": their_texts.iter().map(hex).collect::<Vec<_>>(),
            "responder_records": list(&their_records),
        }),
    );

    let regions1 = [
        ("ephemeral key", 0),
        ("end of the ephemeral key", 31),
        ("static key", 32),
        ("tag of the static key", 79),
        ("payload", 80),
        ("tag of the payload", message1.len() - 1),
    ];
    for (name, position) in regions1 {
        let read = pair.receive(&pair.prologue, &flipped(&message1, position));
        let case = json!({ "message": 1, "position": position });
        file.invalid(&format!("message 1: changed {name}"), read, case);
    }
    for length in [0, 31, 32, 79, 80, 95, message1.len() - 1] {
        let read = pair.receive(&pair.prologue, &message1[..length]);
        let case = json!({ "message": 1, "length": length });
        file.invalid(&format!("message 1: cut to {length} bytes"), read, case);
    }
    let read = pair.receive(&pair.prologue, &longer(&message1));
    file.invalid("message 1: longer", read, json!({ "message": 1, "append": "00" }));
    let read = pair.receive(&pair.prologue, &[0; 4097]);
    let case = json!({ "message": 1, "replaced_by": hex([0; 4097]) });
    file.invalid("message 1: too long", read, case);
    for (name, change) in PROLOGUE_CHANGES {
        let mut prologue = pair.prologue.clone();
        change(&mut prologue);
        let read = pair.receive(&prologue, &message1);
        let case = json!({ "message": 1, "prologue": hex(prologue.encode()) });
        file.invalid(&format!("message 1: read with another {name}"), read, case);
    }
    let other = StaticKeypair::from_secret(secret("other static"));
    let read = receive(&other, &pair.prologue, &message1);
    let case = json!({ "message": 1, "static_secret": hex(other.secret().as_slice()) });
    file.invalid("message 1: read by another static key", read, case);

    let regions2 = [
        ("ML-KEM ciphertext", 0),
        ("end of the ML-KEM ciphertext", 1087),
        ("ephemeral key", 1088),
        ("payload", 1120),
        ("tag of the payload", message2.len() - 1),
    ];
    for (name, position) in regions2 {
        let read = pair.read(&flipped(&message2, position));
        let case = json!({ "message": 2, "position": position });
        file.invalid(&format!("message 2: changed {name}"), read, case);
    }
    for length in [0, 1087, 1088, 1119, 1120, 1135, message2.len() - 1] {
        let read = pair.read(&message2[..length]);
        let case = json!({ "message": 2, "length": length });
        file.invalid(&format!("message 2: cut to {length} bytes"), read, case);
    }
    let read = pair.read(&longer(&message2));
    file.invalid("message 2: longer", read, json!({ "message": 2, "append": "00" }));
    file.invalid(
        "message 2: message 1 sent back",
        pair.read(&message1),
        json!({ "message": 2, "replaced_by": hex(&message1) }),
    );
    let foreign = World::named("other");
    let local = Local { realm_secret: &foreign.epoch.realm, ..pair.local(&pair.responder) };
    let received = pair.receive(&pair.prologue, &message1).expect("sound message");
    let (_, wrong_realm) = pair.answer(received, &local, &mut TestRng::new("responder"));
    file.invalid(
        "message 2: made with another realm secret",
        pair.read(&wrong_realm),
        json!({ "message": 2, "replaced_by": hex(&wrong_realm) }),
    );
    let (_, other1) = pair.initiate(&mut TestRng::new("another"));
    let received = pair.receive(&pair.prologue, &other1).expect("sound message");
    let (_, other2) =
        pair.answer(received, &pair.local(&pair.responder), &mut TestRng::new("responder"));
    file.invalid(
        "message 2: of another handshake",
        pair.read(&other2),
        json!({ "message": 2, "replaced_by": hex(&other2) }),
    );

    let mut record = |name: &str, opened_before: usize, record: &[u8]| {
        let received = pair.receive(&pair.prologue, &message1).expect("sound message");
        let (theirs, _) =
            pair.answer(received, &pair.local(&pair.responder), &mut TestRng::new("responder"));
        let (_, mut opener) = theirs.split();
        for earlier in &our_records[..opened_before] {
            opener.open(&mut earlier.clone()).expect("sound record");
        }
        let mut sealed = record.to_vec();
        let opened = opener.open(&mut sealed);
        let case = json!({ "record": hex(record), "opened_before": opened_before });
        file.invalid(&format!("record: {name}"), opened, case);
    };
    record("changed ciphertext", 0, &flipped(&our_records[0], 0));
    record("changed tag", 0, &flipped(&our_records[0], our_records[0].len() - 1));
    record("cut", 0, &shorter(&our_records[0]));
    record("cut to nothing", 0, &[]);
    record("cut below a tag", 0, &our_records[0][..15]);
    record("longer", 0, &longer(&our_records[0]));
    record("replayed", 1, &our_records[0]);
    record("one skipped", 0, &our_records[1]);
    record("one skipped later", 1, &our_records[2]);
    record("of the other direction", 0, &their_records[0]);
    let secrets = [initiator_ephemeral.as_slice(), responder_ephemeral];
    insider::handshake(&mut file, &pair, kem_seed, &psk, secrets, &message2);
    rekey(&mut file, pair, handshake_hash, &message1, &our_records[0]);
    file
}

/// The next keys of the same tunnel.
fn rekey(
    file: &mut File,
    mut pair: Pair,
    previous_hash: [u8; 32],
    first_message1: &[u8],
    old_record: &[u8],
) {
    let first = pair.prologue.clone();
    pair.prologue = Prologue { rekey: 1, previous_hash, ..first.clone() };
    let (initiator_rng, responder_rng) =
        (&mut TestRng::new("initiator rekeys"), &mut TestRng::new("responder rekeys"));
    let (state, message1) = pair.initiate(initiator_rng);
    let received = pair.receive(&pair.prologue, &message1).expect("sound message");
    let (theirs, message2) = pair.answer(received, &pair.local(&pair.responder), responder_rng);
    let reply = state.read(&message2).expect("sound message");
    let ours = reply.confirm(&pair.peer(&pair.responder)).expect("a member");
    let handshake_hash = ours.handshake_hash();
    assert_eq!(handshake_hash, theirs.handshake_hash());
    let [kem_seed, initiator_ephemeral] = initiator_rng.draws.as_slice() else {
        panic!("the initiator draws twice")
    };
    let [kem_m, responder_ephemeral] = responder_rng.draws.as_slice() else {
        panic!("the responder draws twice")
    };
    let (kem_secret, psk) = psk(pair.world.epoch.realm.as_bytes().as_slice(), kem_seed, &message2);
    let (our_records, _) = seal_all(ours, &[b"first under the next key"]);
    let (_, mut opener) = theirs.split();
    opener.open(&mut our_records[0].clone()).expect("sound record");
    file.valid(
        "rekey of the tunnel above",
        json!({
            "prologue": hex(pair.prologue.encode()),
            "initiator_ml_kem_seed": hex(kem_seed),
            "initiator_ephemeral_secret": hex(initiator_ephemeral),
            "responder_ml_kem_m": hex(kem_m),
            "responder_ephemeral_secret": hex(responder_ephemeral),
            "message1": hex(&message1),
            "message2": hex(&message2),
            "ml_kem_secret": hex(kem_secret),
            "psk": hex(psk),
            "handshake_hash": hex(handshake_hash),
            "initiator_plaintexts": [hex(b"first under the next key")],
            "initiator_records": [hex(&our_records[0])],
        }),
    );
    let mut refuse = |name: &str, prologue: Prologue, message1: &[u8]| {
        let read = pair.receive(&prologue, message1);
        let case = json!({
            "message": 1,
            "prologue": hex(prologue.encode()),
            "replaced_by": hex(message1),
        });
        file.invalid(&format!("rekey: {name}"), read, case);
    };
    let sound = &pair.prologue;
    refuse("with the number before", Prologue { rekey: 0, ..sound.clone() }, &message1);
    refuse("with the number after", Prologue { rekey: 2, ..sound.clone() }, &message1);
    let no_hash = Prologue { previous_hash: [0; 32], ..sound.clone() };
    refuse("without the handshake hash before", no_hash, &message1);
    let own_hash = Prologue { previous_hash: handshake_hash, ..sound.clone() };
    refuse("with its own handshake hash", own_hash, &message1);
    refuse("as the first handshake of a tunnel", first, &message1);
    refuse("by the message that began the tunnel", sound.clone(), first_message1);
    let mut sealed = old_record.to_vec();
    let opened = opener.open(&mut sealed);
    file.invalid(
        "rekey: record of the keys before",
        opened,
        json!({ "record": hex(old_record), "opened_before": 1, "of": "rekey of the tunnel above" }),
    );
}

fn records() -> File {
    let mut file = File::new("records", "The plaintext of records; big-endian, DATA padded to 16");
    let stream = |number| StreamId::new(number).expect("even");
    let state = |number, end| StreamState {
        stream: stream(number),
        received: 0x0102_0304,
        max_data: 0x0a0b_0c0d,
        end,
    };
    let progress = Progress {
        next_stream: stream(10),
        max_data: 16 << 20,
        received: 7,
        streams: vec![state(2, None), state(4, Some(End::Fin(77))), state(8, Some(End::Reset(9)))],
        more: true,
    };
    let fresh = Progress {
        next_stream: StreamId::FIRST,
        max_data: 16 << 20,
        received: 0,
        streams: vec![],
        more: false,
    };
    let places = |numbers: &[u64]| {
        let place = |seq: &u64| Head { seq: *seq, hash: EntryHash(bytes(&seq.to_string())) };
        numbers.iter().map(place).collect::<Vec<_>>()
    };
    let twenty: Vec<u64> = (1..=20).rev().collect();
    let mut two_entries = Vec::new();
    for entry in [&b"first"[..], b"second"] {
        assert!(put_trust_entry(&mut two_entries, entry));
    }
    let rekey = |number, attempt| RekeyTry { number, attempt };
    let (longest1, longest2) = ([7; 4096], [8; 1088 + 4096]);
    let codes = [CloseCode::Normal, CloseCode::Protocol, CloseCode::Other(999)];
    let mut sound = vec![
        ("HELLO of a new channel".to_owned(), Record::Hello { new: true, progress: fresh.clone() }),
        ("HELLO that resumes".to_owned(), Record::Hello { new: false, progress: progress.clone() }),
        ("WELCOME".to_owned(), Record::Welcome(progress)),
        ("READY".to_owned(), Record::Ready),
        ("TRUST_GET from the beginning".to_owned(), Record::TrustGet(vec![])),
        ("TRUST_GET, three places".to_owned(), Record::TrustGet(places(&[300, 299, 1]))),
        ("TRUST_GET, 20 places".to_owned(), Record::TrustGet(places(&twenty))),
        ("TRUST of nothing".to_owned(), Record::Trust { more: false, entries: &[] }),
        ("TRUST of two entries".to_owned(), Record::Trust { more: true, entries: &two_entries }),
        (
            "OPEN stream 2 to the target".to_owned(),
            Record::Open { stream: stream(2), purpose: Purpose::Target },
        ),
        (
            "OPEN stream 4 for a check".to_owned(),
            Record::Open { stream: stream(4), purpose: Purpose::Check },
        ),
        (
            "OPEN stream 6 as a sink".to_owned(),
            Record::Open { stream: stream(6), purpose: Purpose::Sink },
        ),
        (
            "OPEN stream 8 as a source".to_owned(),
            Record::Open { stream: stream(8), purpose: Purpose::Source },
        ),
        (
            "OPEN stream 10 for a purpose of a later version".to_owned(),
            Record::Open { stream: stream(10), purpose: Purpose::Other(200) },
        ),
        ("OPENED stream 2".to_owned(), Record::Opened(stream(2))),
        ("DATA, one byte".to_owned(), Record::Data { stream: stream(2), offset: 0, bytes: b"x" }),
        (
            "DATA, no padding".to_owned(),
            Record::Data { stream: stream(2), offset: 5, bytes: b"xy" },
        ),
        ("ACK".to_owned(), Record::Ack { stream: stream(2), offset: 1 << 40 }),
        ("WINDOW of a stream".to_owned(), Record::Window { stream: Some(stream(4)), max_data: 9 }),
        ("WINDOW of the channel".to_owned(), Record::Window { stream: None, max_data: 9 }),
        ("FIN".to_owned(), Record::Fin { stream: stream(2), total: 3 }),
        (
            "RESET, target refused".to_owned(),
            Record::Reset { stream: stream(2), code: ResetCode::TargetRefused, total: 3 },
        ),
        ("PING".to_owned(), Record::Ping(1)),
        ("PONG".to_owned(), Record::Pong(u64::MAX)),
        ("HS_WANT".to_owned(), Record::HsWant(1)),
        ("HS1".to_owned(), Record::Hs1 { rekey: rekey(1, 0), message: &[7; 96] }),
        ("HS1, longest".to_owned(), Record::Hs1 { rekey: rekey(9, 5), message: &longest1 }),
        ("HS2".to_owned(), Record::Hs2 { rekey: rekey(1, 0), message: &[8; 96] }),
        ("HS2, longest".to_owned(), Record::Hs2 { rekey: rekey(9, 5), message: &longest2 }),
        ("SWITCH".to_owned(), Record::Switch(rekey(1, 0))),
        ("SWITCH, last number and try".to_owned(), Record::Switch(rekey(u32::MAX, 5))),
    ];
    for code in codes {
        sound.push((format!("TUNNEL_CLOSE {}", code.number()), Record::TunnelClose(code)));
        sound.push((format!("CHANNEL_CLOSE {}", code.number()), Record::ChannelClose(code)));
    }
    let mut wires = Vec::new();
    for (name, record) in &sound {
        let mut wire = Vec::new();
        record.encode(&mut wire);
        assert_eq!(Record::decode(&wire).as_ref(), Ok(record));
        file.valid(name, json!({ "record": hex(&wire) }));
        wires.push((name.clone(), wire));
    }

    let mut refuse = |name: &str, wire: &[u8]| {
        file.invalid(name, Record::decode(wire), json!({ "record": hex(wire) }));
    };
    refuse("nothing", &[]);
    for kind in [0x00, 0x06, 0x22, 0x34, 0xff] {
        refuse(&format!("type {kind:#04x}"), &[kind]);
    }
    for (name, wire) in &wires {
        // DATA ends where its record ends, and may be padded to any length: its sender decides.
        if name == "TRUST of nothing" {
            refuse(&format!("{name}, cut"), &shorter(wire));
        } else if name.ends_with("longest") {
            refuse(&format!("{name}, longer"), &longer(wire));
        } else if !name.starts_with("DATA") && !name.starts_with("HS1") && !name.starts_with("HS2")
        {
            refuse(&format!("{name}, cut"), &shorter(wire));
            refuse(&format!("{name}, longer"), &longer(wire));
        }
    }
    let wire_of = |wanted: &str| {
        let found = wires.iter().find(|(name, _)| name == wanted);
        found.map(|(_, wire)| wire.clone()).expect("one of those above")
    };
    let (hello, welcome) = (&wire_of("HELLO that resumes"), &wire_of("WELCOME"));
    let data = &wire_of("DATA, one byte");
    let patched = |wire: &[u8], position: usize, value: u8| {
        let mut changed = wire.to_vec();
        changed[position] = value;
        changed
    };
    refuse("HS_WANT of the first keys", &[0x30, 0, 0, 0, 0]);
    for (kind, name) in [(0x31, "HS1"), (0x32, "HS2"), (0x33, "SWITCH")] {
        let message: &[u8] = if name == "SWITCH" { &[] } else { &[7] };
        let wire = |number: u8, attempt| [&[kind, 0, 0, 0, number, attempt], message].concat();
        assert!(Record::decode(&wire(1, 5)).is_ok());
        refuse(&format!("{name} of the first keys"), &wire(0, 0));
        refuse(&format!("{name} with a try too many"), &wire(1, 6));
        refuse(&format!("{name} without a try"), &[kind, 0, 0, 0, 1]);
        if name != "SWITCH" {
            refuse(&format!("{name} without a message"), &[kind, 0, 0, 0, 1, 0]);
        }
    }
    refuse("HELLO with an unknown flag", &patched(hello, 1, 0x04));
    refuse("WELCOME that is new", &patched(welcome, 1, 0x01));
    refuse("HELLO with an odd next stream", &patched(hello, 5, 11));
    refuse("HELLO with next stream 0", &patched(hello, 5, 0));
    refuse("HELLO that lists a stream not yet opened", &patched(hello, 5, 8));
    refuse("HELLO with the same stream twice", &patched(hello, 24 + 29 + 3, 2));
    refuse("HELLO with an unknown kind of end", &patched(hello, 24 + 20, 3));
    refuse("HELLO with a total for no end", &patched(hello, 24 + 28, 1));
    let get = |count: u8, numbers: &[u64]| {
        let place = |head: Head| [&head.seq.to_be_bytes()[..], &head.hash.0].concat();
        let places: Vec<_> = places(numbers).into_iter().flat_map(place).collect();
        [&[0x04, count], places.as_slice()].concat()
    };
    refuse("TRUST_GET, 21 places", &get(21, &(1..=21).rev().collect::<Vec<_>>()));
    refuse("TRUST_GET of the genesis", &get(1, &[0]));
    refuse("TRUST_GET, places ascending", &get(2, &[1, 2]));
    refuse("TRUST_GET, a place twice", &get(2, &[2, 2]));
    refuse("TRUST_GET, a place more than it says", &get(1, &[2, 1]));
    refuse("TRUST_GET, a place less than it says", &get(3, &[2, 1]));
    refuse("TRUST with an unknown flag", &[&[0x05, 1], two_entries.as_slice()].concat());
    refuse("TRUST of nothing and more", &[0x05, 2]);
    refuse("TRUST with a length cut", &[0x05, 0, 0, 0, 0]);
    refuse("TRUST with an entry cut", &[0x05, 0, 0, 0, 0, 2, 7]);
    refuse("TRUST with a length of 2^32 − 1", &[0x05, 0, 0xff, 0xff, 0xff, 0xff, 7]);
    let mut long = [&[0x05, 0][..], &59_997_u32.to_be_bytes()].concat();
    long.resize(2 + 60_001, 7);
    refuse("TRUST of 60,001 bytes", &long);
    refuse("OPEN of stream 0", &[0x10, 0, 0, 0, 0, 0]);
    refuse("OPEN of an odd stream", &[0x10, 0, 0, 0, 3, 0]);
    refuse("OPEN without a purpose", &[0x10, 0, 0, 0, 2]);
    refuse("WINDOW of an odd stream", &[&[0x14, 0, 0, 0, 1][..], &[0; 8]].concat());
    refuse("DATA with 16 bytes of padding", &patched(data, 1, 16));
    refuse("DATA with more padding than bytes", &patched(data, 1, 15));
    refuse("DATA with padding that is not zero", &patched(data, data.len() - 1, 1));
    let many = [&[0x01, 0, 0, 0, 0x08, 0x04][..], &[0; 16], &1025_u16.to_be_bytes()].concat();
    let listed = (1..=1025_u32).map(|number| [&(2 * number).to_be_bytes()[..], &[0; 25]].concat());
    refuse("HELLO with 1,025 streams", &listed.fold(many, |all, one| [all, one].concat()));
    let beyond = [&[0x12, 0, 0, 0, 0, 2][..], &[0xff; 8], b"x"].concat();
    refuse("DATA that ends at 2^64", &beyond);
    refuse("DATA without a byte", &[&[0x12, 2, 0, 0, 0, 2][..], &[0; 10]].concat());
    file
}

fn checks() -> File {
    let mut file = File::new("checks", "Reports on check streams: each has one spelling");
    let text = |text: &str| Printable::of(text).expect("printable");
    let protocol = |name: &str| Protocol::new(name).expect("a name");
    let plain = |outcome| CheckReport {
        outcome,
        resolved: None,
        connected_micros: None,
        protocol: protocol("tcp"),
        detail: None,
        warning: None,
        tls: None,
    };
    let full = CheckReport {
        outcome: Outcome::Connected,
        resolved: Some(Resolved { addresses: 2, micros: 3100 }),
        connected_micros: Some(400),
        protocol: protocol("postgres"),
        detail: Some(text("asks for a password")),
        warning: Some(text("an odd thing")),
        tls: Some(TlsReport {
            version: text("TLS 1.3"),
            names: vec![text("db.internal"), text("*.example")],
            not_before: Some(1_700_000_000),
            not_after: Some(1_800_000_000),
            name_matches: Some(true),
            trusted: Some(false),
        }),
    };
    let mut sound = vec![
        ("everything".to_owned(), full.clone()),
        (
            "a connection and no more".to_owned(),
            CheckReport { connected_micros: Some(0), ..plain(Outcome::Connected) },
        ),
    ];
    for (name, outcome) in [
        ("the name is unknown", Outcome::NameUnknown),
        ("refused", Outcome::Refused),
        ("no answer", Outcome::TimedOut),
        ("no way there", Outcome::Unreachable),
    ] {
        sound.push((name.to_owned(), plain(outcome)));
    }
    for (name, report) in &sound {
        let wire = report.encode();
        assert_eq!(CheckReport::decode(&wire).as_ref(), Ok(report));
        file.valid(name, json!({ "report": hex(&wire) }));
    }
    let wire = full.encode();
    // A key that readers of this version skip.
    let mut later = wire.clone();
    later[0] += 1;
    later.extend([0x18, 0x40, 0x00]);
    assert_eq!(CheckReport::decode(&later).as_ref(), Ok(&full));
    file.valid("an optional field of a later version", json!({ "report": hex(&later) }));

    let mut refuse = |name: &str, wire: &[u8]| {
        file.invalid(name, CheckReport::decode(wire), json!({ "report": hex(wire) }));
    };
    let refused = plain(Outcome::Refused).encode();
    let patched = |wire: &[u8], position: usize, value: u8| {
        let mut changed = wire.to_vec();
        changed[position] = value;
        changed
    };
    let with = |key: u8, value: &[u8]| [&[refused[0] + 1], &refused[1..], &[key], value].concat();
    refuse("nothing", &[]);
    refuse("cut", &shorter(&wire));
    refuse("longer", &longer(&wire));
    refuse("another version", &patched(&wire, 2, 2));
    refuse("an outcome that does not exist", &patched(&refused, 4, 5));
    refuse("a connection without its time", &patched(&refused, 4, 0));
    refuse("a protocol in capitals", &patched(&refused, 7, b'T'));
    refuse("a text of nothing", &with(6, &[0x60]));
    refuse("a text with an escape", &with(6, b"\x62\x1bc"));
    refuse("a text that turns what follows", &with(6, b"\x63\xe2\x80\xae"));
    let long = [&[0x78, 254], [b'x'; 254].as_slice()].concat();
    refuse("a text that is too long", &with(6, &long));
    refuse("a critical field of a later version", &with(9, &[0]));
    let names = [&[0xa2, 0x01, 0x61, b'T', 0x02, 0x89], [0x61, b'n'].repeat(9).as_slice()].concat();
    refuse("nine names", &with(8, &names));
    refuse("addresses without their time", b"\xa4\x00\x01\x01\x01\x02\x02\x05\x63tcp");
    refuse("longer than any", &[0; 4097]);
    file
}

fn packets() -> File {
    let mut file = File::new(
        "packets",
        "Sealed records as text frames: RFC 4648 section 4, standard alphabet, no padding",
    );
    for length in [0, 1, 2, 3, 16, 48] {
        let record = &bytes::<48>("packet")[..length];
        let mut text = Vec::new();
        encode_base64(record, &mut text);
        let text = String::from_utf8(text).expect("base64 is ASCII");
        file.valid(&format!("{length} bytes"), json!({ "record": hex(record), "text": text }));
    }
    for (name, text) in [
        ("padding", "AAA="),
        ("padding of two", "AA=="),
        ("bits left over in two characters", "AB"),
        ("bits left over in three characters", "AAB"),
        ("one character", "A"),
        ("five characters", "AAAAA"),
        ("alphabet of section 5", "--__"),
        ("space inside", "AAAA AAAA"),
        ("line break at the end", "AAAA\n"),
        ("not ASCII", "AAA\u{fc}"),
    ] {
        let mut decoded = text.as_bytes().to_vec();
        let decoded = decode_base64(&mut decoded);
        file.invalid(name, decoded, json!({ "text": text }));
    }
    file
}
