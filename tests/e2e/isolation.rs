//! Workspaces, held apart: what an agent of B can do to A with a client made by hand, and tickets in the
//! wrong hands.

use std::net::SocketAddr;

use connect_crypto::{
    epoch::EpochSecrets,
    invite::{InviteKeys, InviteSeed},
};
use connect_spec::{
    bytes::Blob,
    control::{ErrorCode, FromAgent, FromHub, Nonce, Reply, Request, SessionKind, close},
    encoding::Encoding,
    ids::{AgentId, ServiceId, TunnelId},
    objects::{AgentRole, Credential, CredentialKind},
};
use connect_tests::{
    client::{Client, Keys, data_socket, rng, sealed, tickets, tunnel_request},
    home::{Pair, Workspace},
    hub::Hub,
    process::Process,
    runtime,
    services::Service,
};
use futures_util::StreamExt;
use tokio_tungstenite::tungstenite::Message;

/// Workspace A with an exposed service, and an agent of workspace B with a client made by hand.
struct Stage {
    a: Workspace,
    a_keys: Keys,
    a_service: ServiceId,
    service: Service,
    probed: usize,
    b_keys: Keys,
    hub: SocketAddr,
    _b: Workspace,
    _agent: Process,
}

impl Stage {
    fn set() -> Self {
        let hub = Hub::shared();
        let (a, b) = (Workspace::found(hub), Workspace::found(hub));
        let agent = a.founder.up();
        let service = Service::echo();
        let exposed =
            a.founder.json(&["expose", &service.address().to_string(), "--name", "prod-db"]);
        let a_service = exposed["service_id"].as_str().and_then(|id| id.parse().ok());
        Self {
            a_keys: Keys::of(&a.founder),
            b_keys: Keys::of(&b.founder),
            a_service: a_service.expect("an id"),
            probed: service.probed(),
            service,
            hub: hub.address(),
            a,
            _b: b,
            _agent: agent,
        }
    }

    /// What B's agent is answered.
    fn ask(&self, request: Request) -> Reply {
        runtime().block_on(async {
            let mut client = Client::login(self.hub, &self.b_keys, SessionKind::Agent).await;
            client.request(request).await
        })
    }

    /// The service of A is where it was, and works.
    #[track_caller]
    fn check_unharmed(&self) {
        let listed = self.a.founder.json(&["services"]);
        let listed = listed.as_array().expect("a list");
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0]["service_id"], self.a_service.to_string());
        assert_eq!(listed[0]["online"], true);
        assert_eq!(self.service.accepted(), self.probed, "the target was dialled");
        self.a.founder.reach("prod-db");
    }
}

fn refused_with(reply: &Reply, expected: ErrorCode) -> bool {
    matches!(reply, Reply::Error(report) if report.code == expected)
}

#[test]
fn other_workspace_sees_no_service_and_no_agent() {
    let stage = Stage::set();
    let tag = stage.a_keys.names.tag(&"prod-db".parse().expect("a name"));
    let reply = stage.ask(Request::Lookup { tag });
    assert!(matches!(&reply, Reply::Services { services, .. } if services.is_empty()), "{reply:?}");
    for after in [None, Some(ServiceId([0; 16]))] {
        let reply = stage.ask(Request::Services { after });
        assert!(
            matches!(&reply, Reply::Services { services, more: false } if services.is_empty()),
            "{reply:?}"
        );
    }
    for after in [None, Some(AgentId([0; 16]))] {
        let reply = stage.ask(Request::Agents { after });
        let Reply::Agents { agents, more: false } = reply else {
            panic!("{reply:?}");
        };
        let ids: Vec<_> = agents.iter().map(|agent| agent.agent_id).collect();
        assert_eq!(ids, [stage.b_keys.agent_id]);
    }
    stage.check_unharmed();
}

#[test]
fn other_workspace_opens_no_tunnel_and_learns_nothing_by_trying() {
    let stage = Stage::set();
    let (service, agent) = (stage.a_service, stage.a_keys.agent_id);
    let there = stage.ask(Request::OpenTunnel(tunnel_request(service, agent)));
    let nowhere =
        stage.ask(Request::OpenTunnel(tunnel_request(ServiceId([8; 16]), AgentId([8; 16]))));
    // Word for word what is said of a service that nobody has.
    assert!(refused_with(&there, ErrorCode::NotFound), "{there:?}");
    assert_eq!(there, nowhere);
    for (service, agent) in [(service, stage.b_keys.agent_id), (ServiceId([8; 16]), agent)] {
        let reply = stage.ask(Request::OpenTunnel(tunnel_request(service, agent)));
        assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
    }
    stage.check_unharmed();
}

#[test]
fn other_workspace_changes_nothing() {
    let stage = Stage::set();
    let tag = stage.a_keys.names.tag(&"prod-db".parse().expect("a name"));
    // The same ids in another workspace are other things, and not A's.
    let reply = stage.ask(Request::Expose {
        service_id: stage.a_service,
        tag,
        record: sealed(u32::MAX),
        take_over: true,
    });
    assert!(matches!(reply, Reply::Done | Reply::Error(_)), "{reply:?}");
    stage.check_unharmed();
    stage.ask(Request::Unexpose { service_id: stage.a_service });
    let reply = stage.ask(Request::PublishAgent { record: sealed(u32::MAX) });
    assert_eq!(reply, Reply::Done);
    stage.check_unharmed();
    let agents = stage.a.founder.json(&["agents"]);
    assert_eq!(agents[0]["label"], "founder");
}

#[test]
fn credential_of_another_workspace_is_refused() {
    let stage = Stage::set();
    let keys = InviteKeys::derive(&InviteSeed::generate(&mut rng()));
    let create = |credential: Credential, signer: &Keys| {
        let signer = signer.signer.as_ref().expect("a founder's");
        let epoch = EpochSecrets::generate(&mut rng());
        let wrap_key = keys.wrap.public();
        let wrap =
            epoch.wrap(&credential.workspace_id, 0, &wrap_key, &mut rng()).expect("a sound key");
        stage.ask(Request::CreateCredential {
            credential: Blob(signer.sign(&credential).encode()),
            wrap_key: Blob(wrap_key.encode()),
            wrap,
        })
    };
    let of = |workspace: &Keys, issuer: &Keys| Credential {
        workspace_id: workspace.workspace_id,
        kind: CredentialKind::Invite,
        invite_key: keys.signing.public(),
        role: AgentRole::Member,
        attrs: workspace.attrs.hash(),
        services: None,
        uses: 1,
        join_until: u64::from(u32::MAX),
        certs_end: u64::from(u32::MAX),
        issuer: issuer.signer.as_ref().expect("a founder's").public(),
        wrap_key_hash: keys.wrap.public().hash(),
    };
    let (a, b) = (&stage.a_keys, &stage.b_keys);
    for (credential, signer) in [
        // A's own, brought by B; B's for A; A's for B; B's signed by A's key.
        (of(a, a), a),
        (of(a, b), b),
        (of(b, a), a),
        (of(b, b), a),
    ] {
        let reply = create(credential, signer);
        assert!(
            refused_with(&reply, ErrorCode::Forbidden)
                || refused_with(&reply, ErrorCode::BadRequest),
            "{reply:?}"
        );
    }
}

#[test]
fn login_needs_the_whole_chain_and_a_fresh_proof() {
    let stage = Stage::set();
    let (a, b) = (&stage.a_keys, &stage.b_keys);
    let attempt = |change: &dyn Fn(&mut connect_spec::control::Login, &Nonce)| {
        runtime().block_on(async {
            let mut client = Client::dial(stage.hub).await;
            let nonce = client.nonce;
            let mut login = b.login(stage.hub, &nonce, SessionKind::Command);
            change(&mut login, &nonce);
            client.send(&FromAgent::Login(Box::new(login))).await;
            let answer = client.next().await;
            assert!(matches!(answer, Some(FromHub::Error(_))), "{answer:?}");
            client.close_code().await
        })
    };
    // B's objects in A; A's objects with B's proof; a proof for another hub, moment or kind.
    type Change<'c> = &'c dyn Fn(&mut connect_spec::control::Login, &Nonce);
    let changes: [Change<'_>; 7] = [
        &|login, _| login.workspace_id = a.workspace_id,
        &|login, nonce| {
            let theirs = a.login(stage.hub, nonce, SessionKind::Command);
            login.presented = theirs.presented;
            login.workspace_id = a.workspace_id;
            login.wrap_key = theirs.wrap_key;
        },
        &|login, _| login.presented.noise_key = a.presented.to_blobs().noise_key,
        &|login, _| {
            *login = b.login(stage.hub, &Nonce([0; 32]), SessionKind::Command);
        },
        &|login, nonce| {
            let other = "127.0.0.1:1".parse().expect("an address");
            let signature = b.login(other, nonce, SessionKind::Command).signature;
            login.signature = signature;
        },
        &|login, nonce| {
            *login = b.login("192.0.2.1:7420".parse().expect("an address"), nonce, login.session);
        },
        &|login, _| login.signature.0[0] ^= 1,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        assert_eq!(attempt(change), Some(close::UNAUTHORIZED), "change {number}");
    }
    stage.check_unharmed();
}

#[test]
fn nothing_is_answered_before_the_login() {
    let hub = Hub::shared().address();
    for request in [
        Request::Services { after: None },
        Request::Agents { after: None },
        Request::OpenTunnel(tunnel_request(ServiceId([0; 16]), AgentId([0; 16]))),
    ] {
        runtime().block_on(async {
            let mut client = Client::dial(hub).await;
            client.send(&FromAgent::Request { id: 1, request }).await;
            let answer = client.next().await;
            assert!(matches!(answer, Some(FromHub::Error(_))), "{answer:?}");
            assert_eq!(client.close_code().await, Some(close::BAD_REQUEST));
        });
    }
}

#[test]
fn member_acts_for_no_other_member() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    pair.carry(service.address(), "svc");
    let exposed = &pair.exposer().json(&["status"])["exposed"][0];
    let id: ServiceId = exposed["service_id"].as_str().and_then(|id| id.parse().ok()).expect("id");
    let other = pair.workspace.join("other");
    let keys = Keys::of(&other);
    let hub = Hub::shared().address();
    runtime().block_on(async {
        let mut client = Client::login(hub, &keys, SessionKind::Agent).await;
        let reply = client.request(Request::Unexpose { service_id: id }).await;
        assert!(refused_with(&reply, ErrorCode::NotFound), "{reply:?}");
        let tag = keys.names.tag(&"svc".parse().expect("a name"));
        let expose = |service_id| Request::Expose {
            service_id,
            tag,
            record: sealed(u32::MAX),
            take_over: true,
        };
        for service_id in [id, ServiceId([3; 16])] {
            let reply = client.request(expose(service_id)).await;
            assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
        }
        // Accepting a tunnel that was not asked of this agent does nothing.
        for tunnel in [TunnelId([0; 16]), TunnelId([1; 16])] {
            let message = Blob(vec![0; 2000]);
            client.send(&FromAgent::AcceptTunnel { tunnel_id: tunnel, message }).await;
            let code = ErrorCode::Refused;
            client.send(&FromAgent::RefuseTunnel { tunnel_id: tunnel, code }).await;
        }
        let reply = client.request(Request::Services { after: None }).await;
        assert!(matches!(&reply, Reply::Services { services, .. } if services.len() == 1));
    });
    assert_eq!(pair.reacher.json(&["status"])["reached"][0]["active"], true);
}

#[test]
fn garbage_tickets_open_nothing() {
    let hub = Hub::shared().address();
    for ticket in ["", "x", &"0".repeat(64), &"F".repeat(64), &"0".repeat(10_000)] {
        for encoding in [Encoding::Base64, Encoding::Binary] {
            let refused = runtime().block_on(data_socket(hub, ticket, encoding)).err();
            assert_eq!(refused, Some(401), "{} characters", ticket.len());
        }
    }
}

#[test]
fn ticket_admits_once_and_in_its_encoding() {
    let workspace = Workspace::found(Hub::shared());
    let other = workspace.join("other");
    let hub = Hub::shared().address();
    runtime().block_on(async {
        let (exposers, reachers, _sessions) =
            tickets(hub, &Keys::of(&workspace.founder), &Keys::of(&other)).await;
        let wrong = data_socket(hub, &reachers, Encoding::Binary).await.err();
        assert!(matches!(wrong, Some(400 | 401)), "{wrong:?}");

        let (exposers_2, reachers_2, _sessions) =
            tickets(hub, &Keys::of(&workspace.founder), &Keys::of(&other)).await;
        let one = data_socket(hub, &reachers_2, Encoding::Base64).await.expect("the first use");
        // The same end cannot play the other one as well.
        assert_eq!(data_socket(hub, &reachers_2, Encoding::Base64).await.err(), Some(401));
        let two = data_socket(hub, &exposers_2, Encoding::Base64).await.expect("the first use");
        for used in [&reachers_2, &exposers_2] {
            assert_eq!(data_socket(hub, used, Encoding::Base64).await.err(), Some(401));
        }
        drop((one, two, exposers));
    });
}

#[test]
fn socket_whose_other_end_does_not_come_is_closed() {
    let workspace = Workspace::found(Hub::shared());
    let other = workspace.join("other");
    let hub = Hub::shared().address();
    runtime().block_on(async {
        let (exposers, reachers, _sessions) =
            tickets(hub, &Keys::of(&workspace.founder), &Keys::of(&other)).await;
        let mut alone = data_socket(hub, &exposers, Encoding::Base64).await.expect("admitted");
        let Some(Ok(message)) = alone.next().await else {
            panic!("it is closed with a word");
        };
        let Message::Close(Some(frame)) = message else {
            panic!("{message:?}");
        };
        assert_eq!(u16::from(frame.code), close::PEER_GONE);
        // By then the other ticket is over, too.
        assert_eq!(data_socket(hub, &reachers, Encoding::Base64).await.err(), Some(401));
    });
}
