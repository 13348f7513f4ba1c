//! The lab: two nodes with pods in network namespaces and cgroups on one machine, agents on them, captures of the wire
//! between them, and the client and server that run inside the pods (`testpod`).
//!
//! Everything a lab makes carries its name: namespaces in `/run/netns`, a cgroup tree, a bpffs directory, a directory for
//! files. So removing a lab needs nothing but the name, and what a killed run left is swept by the next one.

#![forbid(unsafe_code)]

pub mod agent;
pub mod ca;
pub mod cgroup;
pub mod config;
pub mod files;
pub mod http;
pub mod lab;
pub mod metrics;
pub mod names;
pub mod netns;
pub mod pod;
pub mod poll;
pub mod report;
pub mod testpod;
pub mod trio;
pub mod wire;
