//! What is measured.

/// A load of `loadgen`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// As the table and the numbers show it.
    pub name: &'static str,
    /// `loadgen`'s subcommand.
    pub kind: Kind,
    /// At a time.
    pub connections: usize,
    /// Part of the quick bench.
    pub quick: bool,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes, client to server.
    Bulk,
    /// 64-byte echoes on connections that stay.
    Rr,
    /// A connection for each 64-byte echo.
    Crr,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self { name: "bulk, 1 stream", kind: Kind::Bulk, connections: 1, quick: true },
        Self { name: "bulk, 8 streams", kind: Kind::Bulk, connections: 8, quick: false },
        Self { name: "rr, 1 connection", kind: Kind::Rr, connections: 1, quick: true },
        Self { name: "rr, 64 connections", kind: Kind::Rr, connections: 64, quick: true },
        Self { name: "crr, 1 at a time", kind: Kind::Crr, connections: 1, quick: true },
        Self { name: "crr, 16 at a time", kind: Kind::Crr, connections: 16, quick: true },
    ];
}

impl Kind {
    /// `loadgen`'s word for it.
    pub fn subcommand(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Rr => "rr",
            Self::Crr => "crr",
        }
    }
}
