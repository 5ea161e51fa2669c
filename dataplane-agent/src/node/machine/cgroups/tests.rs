use super::*;

const UID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
const ID: &str = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";

/// Finds the pod's cgroups from the place of each process. Processes from 1 on are the pod's, from 100 on the
/// host's, from 200 on those of other namespaces.
fn of(machine: &[(u32, &str)]) -> Result<Vec<String>, String> {
    let members = |folder: &Path| {
        let of = machine
            .iter()
            .filter(|(_, at)| Path::new(at).starts_with(folder));
        Ok(of.map(|(pid, _)| *pid).collect())
    };
    let pids = |from: std::ops::Range<u32>| {
        let all = machine.iter().map(|(pid, _)| *pid);
        all.filter(|pid| from.contains(pid)).collect()
    };
    let (own, hosts) = (pids(1..100), pids(100..200));
    let query = CgroupQuery {
        pods: Path::new("/c/p"),
        agent: Path::new("/c/p/agent/run"),
        own: &own,
        hosts: &hosts,
        members: &members,
    };
    let processes = machine.iter().filter(|(pid, _)| *pid < 100);
    let groups = query.of_pod(&processes.map(|(_, at)| PathBuf::from(at)).collect());
    groups
        .map(|groups| {
            groups
                .iter()
                .map(|group| group.display().to_string())
                .collect()
        })
        .map_err(|why| match why {
            CgroupError::Wrong(why) => why.split(':').next().unwrap_or_default().to_owned(),
            CgroupError::Failed(error) => error.to_string(),
        })
}

#[test]
fn a_pods_cgroup_is_the_one_that_its_containers_share_whichever_are_there() {
    let slice = format!("kubepods-burstable-pod{}.slice", UID.replace('-', "_"));
    let podman = format!("machine.slice/machine-libpod_pod_{ID}.slice");
    for (pod, containers) in [
        (
            format!("/c/p/kubepods.slice/kubepods-burstable.slice/{slice}"),
            "cri-containerd-{}.scope",
        ),
        (format!("/c/p/kubepods/besteffort/pod{UID}"), "{}"),
        (format!("/c/p/{podman}"), "libpod-{}.scope"),
        (format!("/c/p/libpod_parent/{ID}"), "libpod-{}"),
    ] {
        let container = |id: &str| format!("{pod}/{}", containers.replace("{}", id));
        let (pause, app) = (container(ID), container(&ID.replace('5', "6")));
        let expected = Ok(vec![pod.clone()]);
        assert_eq!(of(&[(1, &pause)]), expected, "the first one alone");
        assert_eq!(of(&[(1, &pause), (2, &app)]), expected);
        let inner = format!("{app}/init.scope");
        assert_eq!(
            of(&[(1, &pause), (2, &inner), (200, &inner)]),
            expected,
            "with one inside"
        );
    }
}

#[test]
fn containers_that_only_share_a_namespace_are_each_the_pods_alone() {
    let (one, two) = (
        format!("docker-{ID}.scope"),
        format!("docker-{}.scope", ID.replace('5', "6")),
    );
    let (one, two) = (
        format!("/c/p/system.slice/{one}"),
        format!("/c/p/system.slice/{two}"),
    );
    let others = (200, "/c/p/system.slice/other.service");
    assert_eq!(of(&[(1, &one), others]), Ok(vec![one.clone()]));
    assert_eq!(of(&[(1, &one), (2, &two), others]), Ok(vec![one, two]));
}

#[test]
fn where_nothing_is_named_it_is_the_lowest_that_has_nothing_else() {
    let alone = |group: &str| Ok(vec![group.to_owned()]);
    assert_eq!(
        of(&[(1, "/c/p/web/a"), (2, "/c/p/web/b")]),
        alone("/c/p/web")
    );
    assert_eq!(
        of(&[(1, "/c/p/web"), (200, "/c/p/web/inner")]),
        alone("/c/p/web")
    );
    assert_eq!(
        of(&[(1, "/c/p/web"), (100, "/c/p/web")]),
        alone("/c/p/web"),
        "a shell of the host"
    );
    assert_eq!(
        of(&[(1, "/c/p/s/a"), (2, "/c/p/s/b"), (200, "/c/p/s/c")]),
        Ok(vec!["/c/p/s/a".into(), "/c/p/s/b".into()]),
        "what is above them is others' too"
    );
    let went_in = [
        (1, "/c/p/web"),
        (2, "/c/p/user/session"),
        (100, "/c/p/user/session"),
    ];
    assert_eq!(
        of(&went_in),
        alone("/c/p/web"),
        "who went into it from the host"
    );
}

#[test]
fn what_is_shared_with_all_or_with_the_agent_is_no_pods() {
    let no = |why: &str| Err(why.to_owned());
    let none = "its processes have no cgroup of their own";
    assert_eq!(of(&[]), no("no process is in its network namespace yet"));
    assert_eq!(
        of(&[(1, "/c/else")]),
        no("none of its processes is below /c/p")
    );
    assert_eq!(of(&[(1, "/c/p")]), no(none));
    assert_eq!(
        of(&[
            (1, "/c/p/x"),
            (2, "/c/p/y"),
            (100, "/c/p/x"),
            (101, "/c/p/y")
        ]),
        no(none)
    );
    assert_eq!(
        of(&[(1, "/c/p/agent")]),
        no("its cgroup /c/p/agent has the agent in it")
    );
    assert_eq!(
        of(&[(1, "/c/p/agent"), (2, "/c/p/web")]),
        Ok(vec!["/c/p/web".into()])
    );
}

#[test]
fn only_what_is_named_as_a_pods_or_a_containers_is_one() {
    for name in [
        "podman.service",
        "pod1",
        "kubepods.slice",
        "kubepods-besteffort.slice",
        "session-1.scope",
        "docker.service",
    ] {
        assert_eq!(
            named(&Path::new("/c/p").join(name), Path::new("/c/p")),
            None,
            "{name}"
        );
    }
    let nested = format!("/c/p/docker-{ID}.scope/kubelet.slice/pod{UID}/{ID}");
    let outer = format!("/c/p/docker-{ID}.scope");
    assert_eq!(
        named(Path::new(&nested), Path::new("/c/p")),
        Some(outer.into())
    );
}

#[test]
fn a_pods_uid_is_what_the_kubelet_named_and_nobody_else() {
    let uid = |at: String| uid_of(&Path::new("/c/p").join(at), Path::new("/c/p"));
    let slice = format!("pod{}.slice", UID.replace('-', "_"));
    for kubelets in [
        format!("pod{UID}"),
        format!("kubepods/pod{UID}/{ID}"),
        format!("kubelet/kubepods/burstable/pod{UID}"),
        format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-{slice}/x.scope"),
        format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-{slice}"),
    ] {
        assert_eq!(uid(kubelets.clone()).as_deref(), Some(UID), "{kubelets}");
    }
    let own = UID.replace('0', "1");
    for (theirs, expected) in [
        (format!("docker-{ID}.scope/kubepods/pod{UID}"), None),
        (format!("web/pod{UID}"), None),
        (format!("web/kubepods/pod{UID}"), None),
        (format!("kubepods/web/pod{UID}"), None),
        (format!("user.slice/kubepods-{slice}"), None),
        (format!("kubepods/pod{own}/{ID}/pod{UID}"), Some(own)),
    ] {
        assert_eq!(uid(theirs.clone()), expected, "{theirs}");
    }
}
