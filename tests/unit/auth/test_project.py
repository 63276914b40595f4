"""Who is in a project, and who can leave it."""

from libs.contracts.auth import MemberAdded, MemberRemoved, ProjectCreated
from libs.core.errors import Conflict, NotFound
from libs.testing.given import given
from services.auth.domain.project import PROJECT, AddMember, CreateProject, RemoveMember

CREATED = ProjectCreated(name="Ada's project")
OWNED = MemberAdded(user_id=1, role="owner")
JOINED = MemberAdded(user_id=2, role="member")


def test_a_project_is_made_with_its_owner() -> None:
    then = given(PROJECT).when(CreateProject(name="Ada's project", owner_id=1))
    then.then(CREATED, OWNED)
    assert then.state.owners() == (1,)


def test_a_project_is_made_once() -> None:
    refused = given(PROJECT, CREATED, OWNED).when(CreateProject(name="another", owner_id=2))
    refused.then_refused(Conflict, code="project_exists")


def test_a_user_joins_once() -> None:
    joined = given(PROJECT, CREATED, OWNED).when(AddMember(user_id=2, role="member")).then(JOINED)
    joined.when(AddMember(user_id=2, role="owner")).then_refused(Conflict, code="member_exists")


def test_a_removed_member_holds_no_role() -> None:
    then = given(PROJECT, CREATED, OWNED, JOINED).when(RemoveMember(user_id=2))
    then.then(MemberRemoved(user_id=2))
    assert then.state.role_of(2) is None
    assert then.state.role_of(1) == "owner"


def test_the_last_owner_stays() -> None:
    refused = given(PROJECT, CREATED, OWNED, JOINED).when(RemoveMember(user_id=1))
    refused.then_refused(Conflict, code="last_owner")


def test_one_of_two_owners_may_go() -> None:
    second = MemberAdded(user_id=2, role="owner")
    given(PROJECT, CREATED, OWNED, second).when(RemoveMember(user_id=1)).then(MemberRemoved(user_id=1))


def test_only_a_member_is_removed() -> None:
    given(PROJECT, CREATED, OWNED).when(RemoveMember(user_id=9)).then_refused(NotFound, code="user_not_found")


def test_nobody_joins_a_project_that_is_not_there() -> None:
    given(PROJECT).when(AddMember(user_id=2, role="member")).then_refused(NotFound, code="project_not_found")
