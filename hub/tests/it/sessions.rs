//! Enrolment, login, the directory, and what is refused.

use connect_hub::limits::{MAX_OPEN_CREDENTIALS, MAX_SESSIONS_PER_AGENT};
use connect_spec::{
    control::{ErrorCode, FromAgent, FromHub, Reply, Request, SessionKind, close},
    ids::{AgentId, LookupTag, ServiceId, WorkspaceId},
};
use futures_util::SinkExt as _;
use sqlx::Connection as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::{Control, Workspace, error_code, expose, new_key, past, record, wrap_key},
    process::HubProcess,
    template::place,
};

const SERVICE: ServiceId = ServiceId([0xd1; 16]);
const TAG: LookupTag = LookupTag([0xd2; 16]);

#[tokio::test]
async fn an_invite_admits_as_many_as_it_says() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut founder = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;

    let invite = workspace.invite(1, None);
    founder.done(invite.request()).await;
    assert_eq!(founder.refused(invite.request()).await, ErrorCode::AlreadyExists);
    let mut first = Control::connect(hub.agents).await;
    match first.redeem(&workspace, &invite).await {
        FromHub::Invitation { credential, wrap, .. } => {
            assert_eq!(credential.0, invite.credential.encode());
            assert_eq!(wrap, Some(crate::client::wrap()));
        }
        other => panic!("{other:?}"),
    }
    let joiner = workspace.joiner(&invite);
    let welcome = first.try_log_in(&joiner, |_| ()).await;
    assert!(matches!(welcome, FromHub::Welcome { displaced: false, .. }), "{welcome:?}");

    // The same agent comes back as often as it likes; another one is too late.
    let mut again = Control::connect(hub.agents).await;
    let welcome = again.try_log_in(&joiner, |_| ()).await;
    assert!(matches!(welcome, FromHub::Welcome { displaced: true, .. }), "{welcome:?}");
    let mut second = Control::connect(hub.agents).await;
    assert_eq!(error_code(second.redeem(&workspace, &invite).await), ErrorCode::InviteUsed);
    second.expect_close(close::UNAUTHORIZED).await;
    let mut second = Control::connect(hub.agents).await;
    let refusal = second.try_log_in(&workspace.joiner(&invite), |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::InviteUsed);

    let unknown = workspace.invite(1, None);
    let mut stranger = Control::connect(hub.agents).await;
    assert_eq!(error_code(stranger.redeem(&workspace, &unknown).await), ErrorCode::InviteUnknown);
    let mut stranger = Control::connect(hub.agents).await;
    let refusal = stranger.try_log_in(&workspace.joiner(&unknown), |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::InviteUnknown);

    let expired = workspace.invite(1, Some(past()));
    founder.done(expired.request()).await;
    let mut late = Control::connect(hub.agents).await;
    assert_eq!(error_code(late.redeem(&workspace, &expired).await), ErrorCode::InviteExpired);
    let mut late = Control::connect(hub.agents).await;
    let refusal = late.try_log_in(&workspace.joiner(&expired), |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::InviteExpired);

    // A credential that no signer signed.
    let foreign = Workspace::new().invite(1, None);
    assert_eq!(founder.refused(foreign.request()).await, ErrorCode::Forbidden);
    hub.stop().await;
}

#[tokio::test]
async fn a_proof_holds_for_one_name_one_connection_and_one_key() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let agent = workspace.founder();
    drop(Control::log_in(hub.agents, &workspace, &agent).await);

    let mut elsewhere = Control::connect(hub.agents).await;
    elsewhere.authority = "hub.example:443".to_owned();
    let refusal = elsewhere.try_log_in(&agent, |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::WrongAuthority);

    // A proof for another name of the loopback interface is not one for this name.
    let mut renamed = Control::connect(hub.agents).await;
    let refusal =
        renamed.try_log_in(&agent, |login| login.authority = "localhost:1".to_owned()).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);

    let recorded = Control::connect(hub.agents).await;
    let mut replayed = Control::connect(hub.agents).await;
    replayed.nonce = recorded.nonce;
    assert_eq!(error_code(replayed.try_log_in(&agent, |_| ()).await), ErrorCode::Unauthorized);
    replayed.expect_close(close::UNAUTHORIZED).await;

    let mut impostor = Control::connect(hub.agents).await;
    let other = workspace.founder().login(&impostor.authority, &impostor.nonce);
    let refusal = impostor.try_log_in(&agent, |login| login.signature = other.signature).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);

    // A wrap key that the NoiseKey does not bind: what is wrapped to it, another could open.
    let mut wrapped = Control::connect(hub.agents).await;
    let other = wrap_key(7).encode();
    let refusal = wrapped.try_log_in(&agent, |login| login.wrap_key = other.into()).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);

    // Who saw an invite's id and not its code.
    let mut founder = Control::log_in(hub.agents, &workspace, &agent).await;
    let invite = workspace.invite(1, None);
    founder.done(invite.request()).await;
    let mut thief = Control::connect(hub.agents).await;
    let refusal = thief.redeem_by(&workspace, &invite, &new_key()).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);

    let mut stranger = Control::connect(hub.agents).await;
    let unknown = Workspace::new();
    let refusal = stranger.try_log_in(&unknown.founder(), |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::UnknownWorkspace);
    let mut liar = Control::connect(hub.agents).await;
    let genesis = unknown.create(None);
    let refusal = liar
        .try_log_in(&agent, |login| {
            login.workspace_id = WorkspaceId([1; 32]);
            login.create = Some(genesis);
        })
        .await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized);
    hub.stop().await;
}

#[tokio::test]
async fn the_same_agent_twice_is_said_aloud() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut agent = workspace.founder();
    let first = Control::log_in(hub.agents, &workspace, &agent).await;

    let mut command = Control::connect(hub.agents).await;
    let welcome = command.try_log_in(&agent, |login| login.session = SessionKind::Command).await;
    assert!(matches!(welcome, FromHub::Welcome { displaced: false, .. }));
    let mut second = Control::connect(hub.agents).await;
    let welcome = second.try_log_in(&agent, |_| ()).await;
    assert!(matches!(welcome, FromHub::Welcome { displaced: true, .. }));
    first.expect_close(close::DISPLACED).await;

    // Another key under one counter: two machines, or an attacker.
    let mut clone = Control::connect(hub.agents).await;
    agent.static_key = [6; 32];
    assert_eq!(error_code(clone.try_log_in(&agent, |_| ()).await), ErrorCode::Clone);
    let mut rotated = Control::connect(hub.agents).await;
    agent.noise_counter = 2;
    assert!(matches!(rotated.try_log_in(&agent, |_| ()).await, FromHub::Welcome { .. }));
    let mut restored = Control::connect(hub.agents).await;
    agent.noise_counter = 1;
    assert_eq!(error_code(restored.try_log_in(&agent, |_| ()).await), ErrorCode::Stale);
    hub.stop().await;
}

#[tokio::test]
async fn the_directory_outlives_agents_and_the_hub() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let (exposer, reader) = (workspace.founder(), workspace.founder());
    let mut exposing = Control::log_in(hub.agents, &workspace, &exposer).await;
    let mut reading = Control::log_in(hub.agents, &workspace, &reader).await;
    exposing.done(Request::PublishAgent { record: record(1) }).await;
    exposing.done(expose(SERVICE, TAG, 1)).await;
    match reading.request(expose(ServiceId([1; 16]), TAG, 1)).await {
        Reply::Error(report) => {
            assert_eq!((report.code, report.agent_id), (ErrorCode::NameTaken, Some(exposer.id)));
        }
        other => panic!("{other:?}"),
    }

    let find = async |control: &mut Control, request: Request| match control.request(request).await
    {
        Reply::Services { services, more: false } => services,
        other => panic!("{other:?}"),
    };
    for request in [Request::Lookup { tag: TAG }, Request::Services { after: None }] {
        let services = find(&mut reading, request).await;
        assert_eq!(services.len(), 1);
        assert_eq!((services[0].service_id, services[0].agent_id), (SERVICE, exposer.id));
        assert_eq!((&services[0].record, services[0].online), (&record(1), true));
    }
    assert_eq!(find(&mut reading, Request::Lookup { tag: LookupTag([0; 16]) }).await, []);
    assert_eq!(find(&mut reading, Request::Services { after: Some(SERVICE) }).await, []);
    match reading.request(Request::Agents { after: None }).await {
        Reply::Agents { agents, more: false } => {
            let mut expected = [(exposer.id, Some(record(1))), (reader.id, None)];
            expected.sort_by_key(|(id, _)| *id);
            let found: Vec<_> =
                agents.iter().map(|agent| (agent.agent_id, agent.record.clone())).collect();
            assert_eq!(found, expected);
            assert!(agents.iter().all(|agent| agent.online));
        }
        other => panic!("{other:?}"),
    }

    hub.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(matches!(exposing.receive().await, FromHub::Restarting { reconnect_in_ms: 1.. }));
    exposing.expect_close(close::RESTARTING).await;
    let (status, log) = hub.wait().await;
    assert!(status.success(), "{log}");

    // Nobody needs to create anything again; the service is there, its exposer is not.
    let hub = HubProcess::start(&data_dir).await;
    let mut reading = Control::connect(hub.agents).await;
    assert!(matches!(reading.try_log_in(&reader, |_| ()).await, FromHub::Welcome { .. }));
    assert!(!find(&mut reading, Request::Lookup { tag: TAG }).await[0].online);
    let mut exposing = Control::connect(hub.agents).await;
    assert!(matches!(exposing.try_log_in(&exposer, |_| ()).await, FromHub::Welcome { .. }));
    assert!(find(&mut reading, Request::Lookup { tag: TAG }).await[0].online);
    exposing.done(expose(SERVICE, TAG, 2)).await;
    assert_eq!(exposing.refused(expose(SERVICE, TAG, 1)).await, ErrorCode::Stale);
    exposing.done(Request::Unexpose { service_id: SERVICE }).await;
    assert_eq!(find(&mut reading, Request::Lookup { tag: TAG }).await, []);
    hub.stop().await;
}

#[tokio::test]
async fn long_lists_come_in_pages() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let mut expected = Vec::new();
    for number in 0..150u8 {
        let (service, mut tag) = (ServiceId([number; 16]), TAG);
        tag.0[0] = number;
        control.done(expose(service, tag, 1)).await;
        expected.push(service);
    }
    let (mut found, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let Reply::Services { services, more } = control.request(Request::Services { after }).await
        else {
            panic!("no services");
        };
        pages += 1;
        after = services.last().map(|service| service.service_id);
        found.extend(services.iter().map(|service| service.service_id));
        if !more {
            break;
        }
    }
    assert_eq!(found, expected);
    assert!(pages > 1, "one page holds it all: the test tests nothing");
    hub.stop().await;
}

#[tokio::test]
async fn workspaces_do_not_see_each_other() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let (ours, theirs) = (Workspace::new(), Workspace::new());
    let exposer = ours.founder();
    let mut exposing = Control::log_in(hub.agents, &ours, &exposer).await;
    exposing.done(expose(SERVICE, TAG, 1)).await;

    let stranger = theirs.founder();
    let mut control = Control::log_in(hub.agents, &theirs, &stranger).await;
    for request in [Request::Lookup { tag: TAG }, Request::Services { after: None }] {
        assert_eq!(
            control.request(request).await,
            Reply::Services { services: vec![], more: false }
        );
    }
    match control.request(Request::Agents { after: None }).await {
        Reply::Agents { agents, .. } => {
            assert_eq!(
                agents.iter().map(|agent| agent.agent_id).collect::<Vec<AgentId>>(),
                [stranger.id]
            );
        }
        other => panic!("{other:?}"),
    }
    // What exists elsewhere and what exists nowhere get the same answers.
    for service in [SERVICE, ServiceId([0; 16])] {
        assert_eq!(
            control.refused(Request::Unexpose { service_id: service }).await,
            ErrorCode::NotFound
        );
        let open = crate::tunnels::open(1, service, exposer.id);
        assert_eq!(control.refused(Request::OpenTunnel(open)).await, ErrorCode::NotFound);
    }
    // The same ids are free to use here.
    control.done(expose(SERVICE, TAG, 1)).await;
    // A member of one workspace is nobody in another.
    let mut intruder = Control::connect(hub.agents).await;
    let refusal = intruder.try_log_in(&stranger, |login| login.workspace_id = ours.id).await;
    assert_eq!(error_code(refusal), ErrorCode::Unauthorized, "the proof is for another");
    hub.stop().await;
}

#[tokio::test]
async fn garbage_closes_its_own_connection_only() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut bystander = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;

    let too_long = " ".repeat(connect_spec::limits::MAX_CONTROL_BYTES + 1);
    for (message, code) in [
        (Message::text("not JSON"), close::BAD_REQUEST),
        (Message::text("{}"), close::BAD_REQUEST),
        (Message::text(r#"{"type":"sudo"}"#), close::BAD_REQUEST),
        (Message::text(r#"{"type":"login","authority":1}"#), close::BAD_REQUEST),
        (Message::text("[".repeat(60_000)), close::BAD_REQUEST),
        (Message::binary(vec![1, 2, 3]), close::UNSUPPORTED),
        (Message::text(too_long), close::TOO_BIG),
    ] {
        // Before the login, and after it.
        let mut stranger = Control::connect(hub.agents).await;
        stranger.socket.send(message.clone()).await.unwrap();
        stranger.expect_close(code).await;
        let mut member = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
        member.socket.send(message).await.unwrap();
        member.expect_close(code).await;
    }
    for out_of_place in [
        FromAgent::Request { id: 1, request: Request::Services { after: None } },
        FromAgent::AcceptTunnel {
            tunnel_id: connect_spec::ids::TunnelId([1; 16]),
            message: vec![].into(),
        },
    ] {
        let mut stranger = Control::connect(hub.agents).await;
        stranger.send(out_of_place).await;
        stranger.expect_close(close::BAD_REQUEST).await;
    }
    // An unmasked frame, and the head of one of 100 MiB.
    for (raw, code) in [
        (b"\x81\x02hi".to_vec(), close::PROTOCOL),
        (b"\x81\xff\x00\x00\x00\x00\x06\x40\x00\x00aaaa".to_vec(), close::TOO_BIG),
    ] {
        let stranger = Control::connect(hub.agents).await;
        let mut raw_stream = stranger.socket.into_inner();
        raw_stream.write_all(&raw).await.unwrap();
        let mut answer = Vec::new();
        raw_stream.read_to_end(&mut answer).await.unwrap();
        let [high, low] = code.to_be_bytes();
        assert_eq!(answer, [0x88, 2, high, low], "{raw:x?}");
    }
    // No HTTP at all.
    let mut raw_stream = TcpStream::connect(hub.agents).await.unwrap();
    raw_stream.write_all(&[0xff; 1000]).await.unwrap();
    let mut answer = Vec::new();
    // The hub answers 400 or resets; either way it lets go.
    let _ = raw_stream.read_to_end(&mut answer).await;

    bystander.done(expose(SERVICE, TAG, 1)).await;
    hub.stop().await;
}

#[tokio::test]
async fn an_agent_has_so_many_sessions_and_a_workspace_so_many_open_invites() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let agent = workspace.founder();
    let _founder = Control::log_in(hub.agents, &workspace, &agent).await;
    let command = async || {
        let mut control = Control::connect(hub.agents).await;
        let said = control.try_log_in(&agent, |login| login.session = SessionKind::Command).await;
        (control, said)
    };
    let mut commands = Vec::new();
    for _ in 1..MAX_SESSIONS_PER_AGENT {
        let (control, said) = command().await;
        assert!(matches!(said, FromHub::Welcome { .. }), "{said:?}");
        commands.push(control);
    }
    let (refused, said) = command().await;
    assert_eq!(error_code(said), ErrorCode::Busy);
    refused.expect_close(close::BUSY).await;
    // The agent itself comes in: its newer session takes the place of the older one.
    let mut again = Control::connect(hub.agents).await;
    let welcome = again.try_log_in(&agent, |_| ()).await;
    assert!(matches!(welcome, FromHub::Welcome { displaced: true, .. }), "{welcome:?}");
    drop(commands);

    let superuser = connect_hub::cluster::connect_options(&data_dir, "postgres").unwrap();
    let mut superuser = sqlx::PgConnection::connect_with(&superuser).await.unwrap();
    let rows = i64::try_from(MAX_OPEN_CREDENTIALS).unwrap() - 1;
    for (left, said) in [(1, "open"), (0, "used up, so it does not count")] {
        sqlx::query(
            "INSERT INTO connect.credentials (workspace_id, credential_id, credential, kind, uses, used, join_until, certs_end)
             SELECT $1, substr(sha256(convert_to($3 || n, 'UTF8')), 1, 16), '', 1, 1, 1 - $4, 9999999999, 9999999999
             FROM generate_series(1, $2) n",
        )
        .bind(workspace.id.0.as_slice())
        .bind(rows)
        .bind(said)
        .bind(left)
        .execute(&mut superuser)
        .await
        .unwrap();
    }
    again.done(workspace.invite(1, None).request()).await;
    assert_eq!(again.refused(workspace.invite(1, None).request()).await, ErrorCode::Busy);
    // One that nobody can use any more makes room.
    sqlx::query("UPDATE connect.credentials SET join_until = 1 WHERE credential_id = (SELECT credential_id FROM connect.credentials WHERE credential = '' AND used = 0 LIMIT 1)")
        .execute(&mut superuser)
        .await
        .unwrap();
    again.done(workspace.invite(1, None).request()).await;
    hub.stop().await;
}
