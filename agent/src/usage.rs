//! What one types to use a reached service, by what it speaks.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use connect_spec::ids::ServiceName;

/// A command, or an address for a browser; none for what is spoken by no program that everybody has.
pub(crate) fn of(protocol: &str, name: &ServiceName, address: SocketAddr) -> Option<String> {
    let (ip, port) = (address.ip(), address.port());
    Some(match protocol {
        "postgres" => format!("psql -h {ip} -p {port} -U USER DATABASE"),
        "mysql" => format!("mysql -h {ip} -P {port} -u USER -p"),
        "redis" => format!("redis-cli -h {ip} -p {port}"),
        "mongodb" => format!("mongosh mongodb://{address}"),
        "ssh" => format!("ssh -p {port} USER@{ip}"),
        "http" | "https" => format!("{protocol}://{}/", host(name, address)),
        _ => return None,
    })
}

/// Browsers take each name below `localhost` for this machine, so that cookies of two services stay apart.
fn host(name: &ServiceName, address: SocketAddr) -> String {
    if address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) {
        format!("{name}.localhost:{}", address.port())
    } else {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_can_be_typed() {
        let said = |protocol, address: &str| {
            of(protocol, &"prod".parse().expect("a name"), address.parse().expect("an address"))
        };
        for (protocol, address, expected) in [
            ("postgres", "127.0.0.1:5432", "psql -h 127.0.0.1 -p 5432 -U USER DATABASE"),
            ("mysql", "127.0.0.2:3306", "mysql -h 127.0.0.2 -P 3306 -u USER -p"),
            ("redis", "[::1]:6379", "redis-cli -h ::1 -p 6379"),
            ("mongodb", "[::1]:27017", "mongosh mongodb://[::1]:27017"),
            ("ssh", "127.0.0.1:2222", "ssh -p 2222 USER@127.0.0.1"),
            ("http", "127.0.0.1:8080", "http://prod.localhost:8080/"),
            ("https", "127.0.0.2:8443", "https://127.0.0.2:8443/"),
            ("http", "[::1]:80", "http://[::1]:80/"),
        ] {
            assert_eq!(said(protocol, address).as_deref(), Some(expected));
        }
        for protocol in ["tcp", "", "amqp", "; reboot"] {
            assert_eq!(said(protocol, "127.0.0.1:1"), None);
        }
    }
}
