//! Sealane's agent: one proxy per node that gives every enrolled pod SPIFFE mutual TLS.
//!
//! The modules in the order of one connection: `kernel` hands over the pods' sockets, [`proxy`] serves them; `control`
//! feeds both with immutable snapshots.
#![deny(unsafe_code)]

pub mod identity;
pub mod workload;
